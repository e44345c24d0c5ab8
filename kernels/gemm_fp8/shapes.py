"""What the operands of a product in FP8 must agree on, whoever computes it.

Shape legend: M rows of the left operand, N rows of the right one, K numbers in a row of both, P rows of all groups,
each filled up to a multiple of 128.
"""

from torch import Tensor

from kernels.quantize.layout import TILE, Quantized, QuantizedBlocks, QuantizedColumns, num_tiles


def check_rows_by_blocks(subject: str, left: Quantized, right: QuantizedBlocks) -> tuple[int, int, int]:
    """M, N and K of `left right^T`.

    Raises:
        ValueError: the rows differ in length, or scales do not fit their codes.
    """
    num_rows, depth = _matrix(subject, "left.codes", left.codes)
    num_outputs, _ = _matrix(subject, "right.codes", right.codes)
    _check_depths(subject, depth, right.codes.shape[1])
    _check_scales(subject, "left.scales", left.scales, (num_rows, num_tiles(depth)))
    _check_scales(subject, "right.scales", right.scales, (num_tiles(num_outputs), num_tiles(depth)))
    return num_rows, num_outputs, depth


def check_columns(subject: str, left: QuantizedColumns, right: QuantizedColumns) -> tuple[int, int, int]:
    """M, N and P of `left right^T`.

    Raises:
        ValueError: the operands differ in rows, these are no whole tiles, or scales do not fit their codes.
    """
    num_rows, depth = _matrix(subject, "left.codes", left.codes)
    num_outputs, _ = _matrix(subject, "right.codes", right.codes)
    _check_depths(subject, depth, right.codes.shape[1])
    if depth % TILE:
        nearest = TILE * num_tiles(depth)
        raise ValueError(f"{subject}: left.codes must have a multiple of 128 columns, got {depth}; nearest: {nearest}")
    _check_scales(subject, "left.scales", left.scales, (num_rows, depth // TILE))
    _check_scales(subject, "right.scales", right.scales, (num_outputs, depth // TILE))
    return num_rows, num_outputs, depth


def _matrix(subject: str, name: str, codes: Tensor) -> tuple[int, int]:
    if codes.dim() != 2:
        raise ValueError(f"{subject}: {name} must be a matrix, got {codes.dim()} dimensions; nearest: 2")
    return codes.shape[0], codes.shape[1]


def _check_depths(subject: str, left: int, right: int) -> None:
    if left != right:
        raise ValueError(f"{subject}: right.codes must have as many columns as left.codes, {left}, got {right}")


def _check_scales(subject: str, name: str, scales: Tensor, shape: tuple[int, int]) -> None:
    if tuple(scales.shape) != shape:
        raise ValueError(f"{subject}: {name} must be {list(shape)}, got {list(scales.shape)}")
