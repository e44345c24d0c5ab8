"""Products of matrices in FP8 codes and scales, in plain PyTorch and float32.

A value is its code times its scale, rounded to float32; values are then multiplied and added in float32. The kernels
instead multiply codes and scale the sum over each 128 of K. Both are equally exact: rounding a value costs at most
2^-24 of it, and nothing if scales are powers of two, which is at most the rounding of a product as it enters a sum. One
product of whole matrices is the fastest on a CPU: a pass over the result for every 128 of K costs more than one over
the operands.
"""

# Shape legend: M rows of the left operand, N rows of the right one, K numbers in a row of both, P rows of all groups,
# each padded to a multiple of 128.

import torch
from torch import Tensor

from kernels.quantize.layout import (
    TILE,
    Quantized,
    QuantizedBlocks,
    QuantizedColumns,
    check_codes,
    check_scales,
    num_tiles,
)
from kernels.quantize.reference import dequantize_1x128, dequantize_128x128


def gemm_fp8(left: Quantized, right: QuantizedBlocks, dtype: torch.dtype) -> Tensor:
    """Multiplies by a weight, `left right^T`: [M, N], rounded once, to `dtype` (arXiv:2412.19437, 3.3.2).

    Args:
        left: codes [M, K] with scales by 1 x 128, of activations or gradients. A row that is NaN makes its row NaN.
        right: codes [N, K] with scales by 128 x 128, of a weight or its transpose.
    """
    check_rows_by_blocks("gemm_fp8", left, right)
    left_MK = dequantize_1x128(left, torch.float32)
    right_NK = dequantize_128x128(right, torch.float32)
    return torch.mm(left_MK, right_NK.t()).to(dtype)


def gemm_fp8_columns(left: QuantizedColumns, right: QuantizedColumns) -> Tensor:
    """Multiplies over all groups' rows, `left right^T`: float32 [M, N], a weight's gradient (3.3.2)."""
    check_columns("gemm_fp8_columns", left, right)
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
