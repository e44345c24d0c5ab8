"""What the operands of a product in FP8 must agree on, whoever computes it.

Shape legend: M rows of the left operand, N rows of the right one, K numbers in a row of both, P rows of all groups,
each filled up to a multiple of 128.
"""

from torch import Tensor

from kernels.quantize.checks import check_codes, check_scales
from kernels.quantize.layout import TILE, Quantized, QuantizedBlocks, QuantizedColumns, num_tiles


def check_rows_by_blocks(subject: str, left: Quantized, right: QuantizedBlocks) -> tuple[int, int, int]:
    """M, N and K of `left right^T`.

    Raises:
        ValueError: operands of another kind or on two devices, rows that differ in length, or scales that do not fit
            their codes.
    """
    num_rows, depth = _matrix(subject, "left.codes", left.codes)
    num_outputs, _ = _matrix(subject, "right.codes", right.codes)
    _check_codes(subject, left.codes, right.codes)
    device, tiles = left.codes.device, num_tiles(depth)
    check_scales(f"{subject}: left.scales", left.scales, (num_rows, tiles), device)
    check_scales(f"{subject}: right.scales", right.scales, (num_tiles(num_outputs), tiles), device)
    return num_rows, num_outputs, depth


def check_columns(subject: str, left: QuantizedColumns, right: QuantizedColumns) -> tuple[int, int, int]:
    """M, N and P of `left right^T`.

    Raises:
        ValueError: operands of another kind, on two devices or that differ in rows, rows that are no whole tiles, or
            scales that do not fit their codes.
    """
    num_rows, depth = _matrix(subject, "left.codes", left.codes)
    num_outputs, _ = _matrix(subject, "right.codes", right.codes)
    _check_codes(subject, left.codes, right.codes)
    if depth % TILE:
        nearest = TILE * num_tiles(depth)
        raise ValueError(f"{subject}: left.codes must have a multiple of 128 columns, got {depth}; nearest: {nearest}")
    device, tiles = left.codes.device, depth // TILE
    check_scales(f"{subject}: left.scales", left.scales, (num_rows, tiles), device)
    check_scales(f"{subject}: right.scales", right.scales, (num_outputs, tiles), device)
    return num_rows, num_outputs, depth


def _matrix(subject: str, name: str, codes: Tensor) -> tuple[int, int]:
    if codes.dim() != 2:
        raise ValueError(f"{subject}: {name} must be a matrix, got {codes.dim()} dimensions; nearest: 2")
    check_codes(f"{subject}: {name}", codes)
    return codes.shape[0], codes.shape[1]


def _check_codes(subject: str, left: Tensor, right: Tensor) -> None:
    depth, right_depth = left.shape[1], right.shape[1]
    if depth != right_depth:
        raise ValueError(f"{subject}: right.codes must have as many columns as left.codes, {depth}, got {right_depth}")
    if left.device != right.device:
        raise ValueError(f"{subject}: right.codes must be on {left.device}, where left.codes are, got {right.device}")
