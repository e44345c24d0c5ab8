"""Products in FP8 by the package `deep_gemm` (version 2), or by a fallback where it does not serve.

On Hopper it requires both operands with K contiguous and scales in float32. It transposes row scales itself, so that
they begin at multiples of 16 bytes for each 128 of K. Strided rows, such as those of a packed message, are copied
first. A weight with block scales gives only bfloat16. Row scales on both sides give float32, added to the result's
previous content.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.grouped_gemm import tuned
from kernels.grouped_gemm.reference import check_columns, check_rows_by_blocks
from kernels.launch import ALIGNMENT_BYTES
from kernels.quantize.layout import TILE, Quantized, QuantizedBlocks, QuantizedColumns

OUTPUTS_MULTIPLE = 64
ROWS_BY_ROWS = (1, 1, TILE)  # the package's "recipe": rows to a scale on the left, on the right, and numbers of K


def gemm_fp8(
    left: Quantized,
    right: QuantizedBlocks,
    dtype: torch.dtype,
    *,
    fallback: Callable[[Quantized, QuantizedBlocks, torch.dtype], Tensor] = tuned.gemm_fp8,
) -> Tensor:
    """Implements `reference.gemm_fp8`."""
    num_rows, num_outputs, depth = check_rows_by_blocks("gemm_fp8", left, right)
    suits = dtype == torch.bfloat16 and num_rows > 0 and is_multiple(num_outputs, OUTPUTS_MULTIPLE)
    if not suits or not is_multiple(depth, TILE) or not are_in_order(*right):
        return fallback(left, right, dtype)
    from deep_gemm import fp8_gemm_nt  # type: ignore[import-not-found, unused-ignore]

    out_MN = left.codes.new_empty(num_rows, num_outputs, dtype=dtype)
    fp8_gemm_nt(tuple(make_rows_contiguous(left)), tuple(right), out_MN)
    return out_MN


def gemm_fp8_columns(
    left: QuantizedColumns,
    right: QuantizedColumns,
    *,
    fallback: Callable[[QuantizedColumns, QuantizedColumns], Tensor] = tuned.gemm_fp8_columns,
) -> Tensor:
    """Implements `reference.gemm_fp8_columns`."""
    num_rows, num_outputs, depth = check_columns("gemm_fp8_columns", left, right)
    suits = is_multiple(num_rows, OUTPUTS_MULTIPLE) and is_multiple(num_outputs, OUTPUTS_MULTIPLE)
    if not suits or not is_multiple(depth, TILE) or not are_in_order(*left, *right):
        return fallback(left, right)
    from deep_gemm import fp8_gemm_nt

    out_MN = left.scales.new_zeros(num_rows, num_outputs)
    fp8_gemm_nt(tuple(left), tuple(right), out_MN, c=out_MN, recipe=ROWS_BY_ROWS)
    return out_MN


def make_rows_contiguous(rows: Quantized) -> Quantized:
    """Returns the rows and scales in contiguous memory, aligned as the package requires."""
    codes = rows.codes.contiguous()
    codes = codes if codes.data_ptr() % ALIGNMENT_BYTES == 0 else codes.clone()
    return Quantized(codes, rows.scales.contiguous())


def is_multiple(size: int, multiple: int) -> bool:
    """Whether a size is a multiple of another one, and not 0."""
    return size > 0 and size % multiple == 0


def are_in_order(*tensors: Tensor) -> bool:
    """Whether the package can read tensors without a copy."""
    return all(tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT_BYTES == 0 for tensor in tensors)
