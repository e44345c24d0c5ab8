"""Products in FP8 by the package `deep_gemm` (version 2), if it supports the operands.

On Hopper it requires both operands with K contiguous and scales in float32. It transposes row scales itself, so that
they begin at multiples of 16 bytes for each 128 of K. Strided rows, such as those of a packed message, are copied
first. A weight with block scales gives only bfloat16. Row scales on both sides give float32, added to the result's
previous content.

Shape legend: M rows of the left operand, N rows of the right one, K numbers in a row of both, P rows of all groups,
each padded to a multiple of 128.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.gemm_fp8.reference import check_columns, check_rows_by_blocks
from kernels.quantize.layout import TILE, Quantized, QuantizedBlocks, QuantizedColumns

ALIGNMENT_BYTES = 16
OUTPUTS_MULTIPLE = 64
ROWS_BY_ROWS = (1, 1, TILE)  # the package's "recipe": rows to a scale on the left, on the right, and numbers of K

RowsByBlocks = Callable[[Quantized, QuantizedBlocks, torch.dtype], Tensor]
Columns = Callable[[QuantizedColumns, QuantizedColumns], Tensor]


class DeepGemm:
    """Computes both products by the package, and unsupported ones by a fallback."""

    def __init__(self, fallback: RowsByBlocks, columns_fallback: Columns) -> None:
        """Sets the fallback.

        Args:
            fallback: `kernels.gemm_fp8.triton.gemm_fp8` or an equivalent function.
            columns_fallback: `kernels.gemm_fp8.triton.gemm_fp8_columns` or an equivalent function.
        """
        self._fallback = fallback
        self._columns_fallback = columns_fallback

    def gemm_fp8(self, left: Quantized, right: QuantizedBlocks, dtype: torch.dtype) -> Tensor:
        """Implements `kernels.gemm_fp8.reference.gemm_fp8`."""
        num_rows, num_outputs, depth = check_rows_by_blocks("gemm_fp8", left, right)
        suits = dtype == torch.bfloat16 and num_rows > 0 and _fits(num_outputs, OUTPUTS_MULTIPLE)
        if not suits or not _fits(depth, TILE) or not _in_order(*right):
            return self._fallback(left, right, dtype)
        from deep_gemm import fp8_gemm_nt  # type: ignore[import-not-found, unused-ignore]

        out_MN = left.codes.new_empty(num_rows, num_outputs, dtype=dtype)
        fp8_gemm_nt(tuple(make_rows_contiguous(left)), tuple(right), out_MN)
        return out_MN

    def gemm_fp8_columns(self, left: QuantizedColumns, right: QuantizedColumns) -> Tensor:
        """Implements `kernels.gemm_fp8.reference.gemm_fp8_columns`."""
        num_rows, num_outputs, depth = check_columns("gemm_fp8_columns", left, right)
        suits = _fits(num_rows, OUTPUTS_MULTIPLE) and _fits(num_outputs, OUTPUTS_MULTIPLE)
        if not suits or not _fits(depth, TILE) or not _in_order(*left, *right):
            return self._columns_fallback(left, right)
        from deep_gemm import fp8_gemm_nt

        out_MN = left.scales.new_zeros(num_rows, num_outputs)
        fp8_gemm_nt(tuple(left), tuple(right), out_MN, c=out_MN, recipe=ROWS_BY_ROWS)
        return out_MN


def make_rows_contiguous(rows: Quantized) -> Quantized:
    """Returns the rows and scales in contiguous memory, aligned as the package requires."""
    codes = rows.codes.contiguous()
    codes = codes if codes.data_ptr() % ALIGNMENT_BYTES == 0 else codes.clone()
    return Quantized(codes, rows.scales.contiguous())


def _fits(size: int, multiple: int) -> bool:
    return size > 0 and size % multiple == 0


def _in_order(*matrices: Tensor) -> bool:
    return all(matrix.is_contiguous() and matrix.data_ptr() % ALIGNMENT_BYTES == 0 for matrix in matrices)
