"""Products of matrices and of rows sorted by group, also in FP8, in plain PyTorch.

A value in FP8 is its code times its scale, rounded to float32; values are then multiplied and added in float32. The
kernels instead multiply codes and scale the sum over each 128 of K. Both are equally exact: rounding a value costs at
most 2^-24 of it, and nothing if scales are powers of two, which is at most the rounding of a product as it enters a
sum. One product of whole matrices is the fastest on a CPU: a pass over the result for every 128 of K costs more than
one over the operands.
"""

# Shape legend: A rows (all groups together), P rows after every group is padded to whole tiles, E groups, K and N inner
# and outer width, M rows of the left operand without groups. `counts` is on the host.

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.quantize.layout import (
    TILE,
    Quantized,
    QuantizedBlocks,
    QuantizedColumns,
    check_codes,
    check_counts,
    check_scales,
    num_tiles,
    padded_rows,
)
from kernels.quantize.reference import dequantize_1x128, dequantize_128x128


def grouped_rows(rows_AK: Tensor, weight_ENK: Tensor, counts: Sequence[int]) -> Tensor:
    """Multiplies each group's rows by the transpose of its matrix, AN. Groups may be empty."""
    check_rows("grouped_rows", rows_AK, weight_ENK, counts)
    out_AN = rows_AK.new_empty(rows_AK.shape[0], weight_ENK.shape[1])
    # A product per group: rows of its part times its transposed matrix.
    first = 0
    for group, count in enumerate(counts):
        if count:
            torch.mm(rows_AK[first : first + count], weight_ENK[group].t(), out=out_AN[first : first + count])
        first += count
    return out_AN


def grouped_weight(grad_AN: Tensor, rows_AK: Tensor, counts: Sequence[int]) -> Tensor:
    """Computes the weight gradient of `grouped_rows`, ENK: a group's transposed gradient times its rows."""
    check_weight("grouped_weight", grad_AN, rows_AK, counts)
    out_ENK = grad_AN.new_zeros(len(counts), grad_AN.shape[1], rows_AK.shape[1])
    first = 0
    for group, count in enumerate(counts):
        if count:
            rows = slice(first, first + count)
            torch.mm(grad_AN[rows].t(), rows_AK[rows], out=out_ENK[group])
        first += count
    return out_ENK


class GroupedSizes(NamedTuple):
    """Sizes of a grouped product: A (P if groups are padded), E, N and K."""

    num_rows: int
    num_groups: int
    num_outputs: int
    depth: int


def check_rows(subject: str, rows_AK: Tensor, weight_ENK: Tensor, counts: Sequence[int]) -> GroupedSizes:
    """Returns the sizes of a product of rows with matrices; raises ValueError unless operands match."""
    check_dims(subject, "rows", rows_AK, 2)
    check_dims(subject, "the matrices", weight_ENK, 3)
    _check_alike(subject, "the matrices", weight_ENK, rows_AK)
    num_rows, depth = rows_AK.shape
    num_groups, num_outputs, matrix_depth = weight_ENK.shape
    if matrix_depth != depth:
        raise ValueError(f"{subject}: the matrices must have as many columns as rows, {depth}, got {matrix_depth}")
    if len(counts) != num_groups:
        raise ValueError(f"{subject}: counts must be as many as matrices, {num_groups}, got {len(counts)}")
    check_counts(subject, counts, num_rows)
    return GroupedSizes(num_rows, num_groups, num_outputs, depth)


def check_weight(subject: str, grad_AN: Tensor, rows_AK: Tensor, counts: Sequence[int]) -> GroupedSizes:
    """Returns the sizes of the gradient of one matrix per group; raises ValueError unless operands match."""
    check_dims(subject, "grad", grad_AN, 2)
    check_dims(subject, "rows", rows_AK, 2)
    _check_alike(subject, "grad", grad_AN, rows_AK)
    if len(grad_AN) != len(rows_AK):
        raise ValueError(f"{subject}: grad must have as many rows as rows, {len(rows_AK)}, got {len(grad_AN)}")
    check_counts(subject, counts, len(rows_AK))
    return GroupedSizes(len(rows_AK), len(counts), grad_AN.shape[1], rows_AK.shape[1])


def check_rows_fp8(subject: str, rows: Quantized, weights: QuantizedBlocks, counts: Sequence[int]) -> GroupedSizes:
    """Returns the sizes of a product of FP8 rows with matrices; raises ValueError unless operands match."""
    sizes = check_rows(subject, rows.codes, weights.codes, counts)
    tiles = num_tiles(sizes.depth)
    check_codes(f"{subject}: rows.codes", rows.codes)
    device = rows.codes.device
    blocks = (sizes.num_groups, num_tiles(sizes.num_outputs), tiles)
    check_scales(f"{subject}: rows.scales", rows.scales, (sizes.num_rows, tiles), device)
    check_scales(f"{subject}: weights.scales", weights.scales, blocks, device)
    return sizes


def check_weight_fp8(
    subject: str, grad: QuantizedColumns, rows: QuantizedColumns, counts: Sequence[int]
) -> GroupedSizes:
    """Returns the sizes of the gradient, from FP8, of matrices; raises ValueError unless operands match."""
    num_outputs, num_inputs, num_padded = check_columns(subject, grad, rows)
    check_counts(subject, counts, sum(counts))
    if padded_rows(counts) != num_padded:
        expected = padded_rows(counts)
        raise ValueError(f"{subject}: codes must have {expected} columns, as counts fill up to, got {num_padded}")
    return GroupedSizes(num_padded, len(counts), num_outputs, num_inputs)


def check_dims(subject: str, name: str, tensor: Tensor, num_dims: int) -> None:
    """Raises ValueError unless a tensor has this number of dimensions."""
    if tensor.dim() != num_dims:
        raise ValueError(f"{subject}: {name} must have {num_dims} dimensions, got {tensor.dim()}")


def _check_alike(subject: str, name: str, tensor: Tensor, rows: Tensor) -> None:
    if tensor.dtype != rows.dtype:
        raise ValueError(f"{subject}: {name} must be {rows.dtype}, as rows are, got {tensor.dtype}")
    if tensor.device != rows.device:
        raise ValueError(f"{subject}: {name} must be on {rows.device}, where rows are, got {tensor.device}")


def grouped_rows_fp8(rows: Quantized, weights: QuantizedBlocks, counts: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Computes `gemm_fp8` of each group's rows with its matrix, AN (arXiv:2412.19437, section 3.3.2)."""
    num_rows, _, num_outputs, _ = check_rows_fp8("grouped_rows_fp8", rows, weights, counts)
    out_AN = rows.scales.new_empty(num_rows, num_outputs, dtype=dtype)
    first = 0
    for group, count in enumerate(counts):
        part = slice(first, first + count)
        if count:
            matrix = QuantizedBlocks(weights.codes[group], weights.scales[group])
            out_AN[part] = _multiply_by_blocks(Quantized(rows.codes[part], rows.scales[part]), matrix, dtype)
        first += count
    return out_AN


def grouped_weight_fp8(
    grad: QuantizedColumns, rows: QuantizedColumns, counts: Sequence[int], *, total: Tensor | None = None
) -> Tensor:
    """Computes `gemm_fp8_columns` of each group, ENK, zeros without rows, or adds it to a total."""
    _, num_groups, num_outputs, num_inputs = check_weight_fp8("grouped_weight_fp8", grad, rows, counts)
    out_ENK = grad.scales.new_zeros(num_groups, num_outputs, num_inputs)
    # Codes are padded to whole tiles by group, so a group's columns begin at a multiple of 128.
    first = 0
    for group, count in enumerate(counts):
        size = padded_rows([count])
        if count:
            part = slice(first, first + size)
            tiles = slice(first // TILE, (first + size) // TILE)
            left, right = (
                QuantizedColumns(columns.codes[:, part], columns.scales[:, tiles]) for columns in (grad, rows)
            )
            out_ENK[group] = _multiply_columns(left, right)
        first += size
    return add_to(total, out_ENK)


def add_to(total: Tensor | None, product: Tensor) -> Tensor:
    """Adds a product to a total and returns that, or the product itself without one."""
    return product if total is None else total.add_(product)


def gemm_fp8(left: Quantized, right: QuantizedBlocks, dtype: torch.dtype) -> Tensor:
    """Multiplies by a weight, `left right^T`: [M, N], rounded once, to `dtype` (arXiv:2412.19437, 3.3.2).

    Args:
        left: codes [M, K] with scales by 1 x 128, of activations or gradients. A row that is NaN makes its row NaN.
        right: codes [N, K] with scales by 128 x 128, of a weight or its transpose.
    """
    check_rows_by_blocks("gemm_fp8", left, right)
    return _multiply_by_blocks(left, right, dtype)


def _multiply_by_blocks(left: Quantized, right: QuantizedBlocks, dtype: torch.dtype) -> Tensor:
    left_MK = dequantize_1x128(left, torch.float32)
    right_NK = dequantize_128x128(right, torch.float32)
    return torch.mm(left_MK, right_NK.t()).to(dtype)


def gemm_fp8_columns(left: QuantizedColumns, right: QuantizedColumns, *, total: Tensor | None = None) -> Tensor:
    """Multiplies over all groups' rows, `left right^T`: float32 [M, N], a weight's gradient (3.3.2).

    With a total, [M, N] in float32, the product is added to it, without memory for the product if a kernel can.
    """
    check_columns("gemm_fp8_columns", left, right)
    return add_to(total, _multiply_columns(left, right))


def _multiply_columns(left: QuantizedColumns, right: QuantizedColumns) -> Tensor:
    left_MP, right_NP = (dequantize_1x128(Quantized(*operand), torch.float32) for operand in (left, right))
    return torch.mm(left_MP, right_NP.t())


def check_rows_by_blocks(subject: str, left: Quantized, right: QuantizedBlocks) -> tuple[int, int, int]:
    """Returns M, N and K of `left right^T`; raises ValueError unless the operands match."""
    num_rows, depth = _matrix(subject, "left.codes", left.codes)
    num_outputs, _ = _matrix(subject, "right.codes", right.codes)
    _check_codes(subject, left.codes, right.codes)
    device = left.codes.device
    tiles = num_tiles(depth)
    check_scales(f"{subject}: left.scales", left.scales, (num_rows, tiles), device)
    check_scales(f"{subject}: right.scales", right.scales, (num_tiles(num_outputs), tiles), device)
    return num_rows, num_outputs, depth


def check_columns(subject: str, left: QuantizedColumns, right: QuantizedColumns) -> tuple[int, int, int]:
    """Returns M, N and P of `left right^T`; raises ValueError unless operands match, in whole tiles."""
    num_rows, depth = _matrix(subject, "left.codes", left.codes)
    num_outputs, _ = _matrix(subject, "right.codes", right.codes)
    _check_codes(subject, left.codes, right.codes)
    if depth % TILE:
        nearest = TILE * num_tiles(depth)
        raise ValueError(f"{subject}: left.codes must have a multiple of 128 columns, got {depth}; nearest: {nearest}")
    device = left.codes.device
    tiles = depth // TILE
    check_scales(f"{subject}: left.scales", left.scales, (num_rows, tiles), device)
    check_scales(f"{subject}: right.scales", right.scales, (num_outputs, tiles), device)
    return num_rows, num_outputs, depth


def _matrix(subject: str, name: str, codes: Tensor) -> tuple[int, int]:
    if codes.dim() != 2:
        raise ValueError(f"{subject}: {name} must be a matrix, got {codes.dim()} dimensions; nearest: 2")
    check_codes(f"{subject}: {name}", codes)
    return codes.shape[0], codes.shape[1]


def _check_codes(subject: str, left: Tensor, right: Tensor) -> None:
    depth = left.shape[1]
    right_depth = right.shape[1]
    if depth != right_depth:
        raise ValueError(f"{subject}: right.codes must have as many columns as left.codes, {depth}, got {right_depth}")
    if left.device != right.device:
        raise ValueError(f"{subject}: right.codes must be on {left.device}, where left.codes are, got {right.device}")
