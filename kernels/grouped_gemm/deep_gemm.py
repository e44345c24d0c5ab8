"""Grouped products in FP8 by the package `deep_gemm` (version 2), if it supports the operands.

On Hopper each group's rows must begin at a multiple of 128. Unless all counts are such multiples, rows are gathered
into padded groups and results are gathered back. Otherwise strided rows, such as those of a packed message, are copied.
A gradient requires the columns of each group to be contiguous, one group after the other, so codes are copied into that
order and scales are transposed. Results for rows are only bfloat16. Gradients are float32, added to the result's
previous content.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.gemm_fp8.deep_gemm import OUTPUTS_MULTIPLE, are_in_order, is_multiple, make_rows_contiguous
from kernels.grouped_gemm import tuned
from kernels.grouped_gemm.reference import check_rows_fp8, check_weight_fp8
from kernels.grouped_gemm.triton import copy_to_device
from kernels.quantize.layout import TILE, Quantized, QuantizedBlocks, QuantizedColumns, num_tiles, padded_rows

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
    fallback: Callable[[QuantizedColumns, QuantizedColumns, Sequence[int]], Tensor] = tuned.grouped_weight_fp8,
) -> Tensor:
    """Implements `reference.grouped_weight_fp8`."""
    _, num_groups, num_outputs, num_inputs = check_weight_fp8("grouped_weight_fp8", grad, rows, counts)
    if not supports_weight(grad, rows):
        return fallback(grad, rows, counts)
    from deep_gemm import k_grouped_fp8_gemm_nt_contiguous

    out_ENK = grad.scales.new_zeros(num_groups, num_outputs, num_inputs)
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
    made = torch.empty_like(codes_DP).view(-1)
    first = 0
    for part in codes_DP.split(list(sizes), 1):
        made[first : first + part.numel()].view(part.shape).copy_(part)
        first += part.numel()
    return made


def _across(scales: Tensor) -> Tensor:
    # The package uses scales in this layout directly; its transpose has too little memory for many groups.
    return scales.t().contiguous().t()
