"""Products in FP8 by the package `deep_gemm` (version 2), or by a fallback.

On Hopper it requires both operands with K contiguous and scales in float32. It transposes row scales itself, so that
they begin at multiples of 16 bytes for each 128 of K. Strided rows, such as those of a packed message, are copied
first. A weight with block scales gives only bfloat16. Row scales on both sides give float32, added to the result's
previous content.

In grouped products each group's rows must begin at a multiple of 128. Unless all counts are such multiples, rows are
gathered into padded groups and results are gathered back. A gradient requires the columns of each group to be
contiguous, one group after the other, so codes are copied into that order and scales are transposed.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.gemm import tuned
from kernels.gemm.reference import add_to, check_columns, check_rows_by_blocks, check_rows_fp8, check_weight_fp8
from kernels.gemm.triton_tiles import copy_to_device
from kernels.launch import ALIGNMENT_BYTES
from kernels.quantize.layout import TILE, Quantized, QuantizedBlocks, QuantizedColumns, num_tiles, padded_rows

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
    total: Tensor | None = None,
    fallback: Callable[[QuantizedColumns, QuantizedColumns], Tensor] = tuned.gemm_fp8_columns,
) -> Tensor:
    """Implements `reference.gemm_fp8_columns`."""
    num_rows, num_outputs, depth = check_columns("gemm_fp8_columns", left, right)
    suits = is_multiple(num_rows, OUTPUTS_MULTIPLE) and is_multiple(num_outputs, OUTPUTS_MULTIPLE)
    if not suits or not is_multiple(depth, TILE) or not are_in_order(*left, *right) or not _can_add_to(total):
        return add_to(total, fallback(left, right))
    from deep_gemm import fp8_gemm_nt

    out_MN = left.scales.new_zeros(num_rows, num_outputs) if total is None else total
    operands = ((columns.codes, _across(columns.scales)) for columns in (left, right))
    fp8_gemm_nt(*operands, out_MN, c=out_MN, recipe=ROWS_BY_ROWS)
    return out_MN


def make_rows_contiguous(rows: Quantized) -> Quantized:
    """Returns the rows and scales in contiguous memory, aligned as the package requires."""
    codes = rows.codes.contiguous()
    codes = codes if codes.data_ptr() % ALIGNMENT_BYTES == 0 else codes.clone()
    return Quantized(codes, rows.scales.contiguous())


def is_multiple(size: int, multiple: int) -> bool:
    """Whether a size is a multiple of another one, and not 0."""
    return size > 0 and size % multiple == 0


def _can_add_to(total: Tensor | None) -> bool:
    """Whether the package can add a product to a total."""
    return total is None or (total.dtype == torch.float32 and are_in_order(total))


def are_in_order(*tensors: Tensor) -> bool:
    """Whether the package can read tensors without a copy."""
    return all(tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT_BYTES == 0 for tensor in tensors)


OF_NO_GROUP = -1


def grouped_rows_fp8(
    rows: Quantized,
    weights: QuantizedBlocks,
    counts: Sequence[int],
    dtype: torch.dtype,
    *,
    fallback: Callable[[Quantized, QuantizedBlocks, Sequence[int], torch.dtype], Tensor] = tuned.grouped_rows_fp8,
) -> Tensor:
    """Implements `reference.grouped_rows_fp8`."""
    _, _, num_outputs, _ = check_rows_fp8("grouped_rows_fp8", rows, weights, counts)
    if not supports_rows(rows, weights, dtype):
        return fallback(rows, weights, counts, dtype)
    from deep_gemm import m_grouped_fp8_gemm_nt_contiguous  # type: ignore[import-not-found, unused-ignore]

    layout = _layout_of(counts, rows.codes.device)
    if layout.sources_P is None:
        rows = make_rows_contiguous(rows)
    else:
        rows = Quantized(_select(rows.codes, layout.sources_P), rows.scales.index_select(0, layout.sources_P))
    out_PN = rows.codes.new_empty(len(rows.codes), num_outputs, dtype=dtype)
    m_grouped_fp8_gemm_nt_contiguous(tuple(rows), tuple(weights), out_PN, layout.groups_P)
    return out_PN if layout.places_A is None else out_PN.index_select(0, layout.places_A)


def grouped_weight_fp8(
    grad: QuantizedColumns,
    rows: QuantizedColumns,
    counts: Sequence[int],
    *,
    total: Tensor | None = None,
    fallback: Callable[[QuantizedColumns, QuantizedColumns, Sequence[int]], Tensor] = tuned.grouped_weight_fp8,
) -> Tensor:
    """Implements `reference.grouped_weight_fp8`."""
    _, num_groups, num_outputs, num_inputs = check_weight_fp8("grouped_weight_fp8", grad, rows, counts)
    if not supports_weight(grad, rows) or not _can_add_to(total):
        return add_to(total, fallback(grad, rows, counts))
    from deep_gemm import k_grouped_fp8_gemm_nt_contiguous

    out_ENK = grad.scales.new_zeros(num_groups, num_outputs, num_inputs) if total is None else total
    sizes = [TILE * num_tiles(count) for count in counts]
    left, right = ((_group_by_group(columns.codes, sizes), _across(columns.scales)) for columns in (grad, rows))
    device = out_ENK.device
    k_grouped_fp8_gemm_nt_contiguous(left, right, out_ENK, sizes, copy_to_device(sizes, device), out_ENK)
    return out_ENK


def supports_rows(rows: Quantized, weights: QuantizedBlocks, dtype: torch.dtype) -> bool:
    """Whether the package supports these contiguous rows and matrices, which were checked to match."""
    num_groups, num_outputs, depth = weights.codes.shape
    fits = is_multiple(num_outputs, OUTPUTS_MULTIPLE) and is_multiple(depth, TILE)
    return dtype == torch.bfloat16 and len(rows.codes) > 0 and num_groups > 0 and fits and are_in_order(*weights)


def supports_weight(grad: QuantizedColumns, rows: QuantizedColumns) -> bool:
    """Whether the package supports the operands of a gradient, which were checked to match."""
    fits = all(is_multiple(len(columns.codes), OUTPUTS_MULTIPLE) for columns in (grad, rows))
    return fits and grad.codes.shape[1] > 0 and are_in_order(*grad, *rows)


class _Layout(NamedTuple):
    groups_P: Tensor  # group of each row, -1 for padding
    sources_P: Tensor | None  # source row of each padded row; None if rows keep their places
    places_A: Tensor | None  # padded place of each row; None if rows keep their places


def _layout_of(counts: Sequence[int], device: torch.device) -> _Layout:
    """Computes the layout on the host and copies it asynchronously, as int32."""
    counts_E = torch.tensor(counts)
    padded_E = -(-counts_E // TILE) * TILE
    groups_A = torch.arange(len(counts)).repeat_interleave(counts_E)
    if torch.equal(counts_E, padded_E):
        return _Layout(_copied(groups_A.int(), device), None, None)
    num_rows = sum(counts)
    num_padded = padded_rows(counts)
    # How far the rows of each group move: by the padding of the groups before it.
    shifts_E = (padded_E - counts_E).cumsum(0) - (padded_E - counts_E)
    places_A = torch.arange(num_rows) + shifts_E[groups_A]
    groups_P = torch.full((num_padded,), OF_NO_GROUP).scatter_(0, places_A, groups_A)
    # Any row may serve as padding: its result is not gathered back.
    sources_P = torch.zeros(num_padded, dtype=torch.int64).scatter_(0, places_A, torch.arange(num_rows))
    there = _copied(torch.cat([groups_P, sources_P, places_A]).int(), device)
    return _Layout(*there.split([num_padded, num_padded, num_rows]))


def _copied(indices: Tensor, device: torch.device) -> Tensor:
    return indices.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else indices


def _select(codes: Tensor, sources: Tensor) -> Tensor:
    return codes.view(torch.uint8).index_select(0, sources).view(codes.dtype)


def _group_by_group(codes_DP: Tensor, sizes: Sequence[int]) -> Tensor:
    """Returns the flattened codes of one group after the other, each D rows of the group's columns."""
    codes = torch.empty_like(codes_DP).view(-1)
    first = 0
    for part in codes_DP.split(list(sizes), 1):
        codes[first : first + part.numel()].view(part.shape).copy_(part)
        first += part.numel()
    return codes


def _across(scales: Tensor) -> Tensor:
    # The package uses scales in this layout directly. Its transpose has too little memory above 116,096 rows.
    return scales.t().contiguous().t()
