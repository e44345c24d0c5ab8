"""Operands in FP8 of every code and many scales, and how near a product of them must come to the exact one.

Shape legend: M rows of the left operand, N rows of the right one, K numbers in a row of both.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.quantize.layout import Quantized, QuantizedBlocks, QuantizedColumns, num_tiles

ROUNDING = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
FLOAT32_SUMS = 2.0**-18
"""Error of float32 sums, relative to the sum of magnitudes: 2^-24 for each of 64 roundings, with a margin."""
HOPPER_SUMS = 2.0**-10
"""Error of sums that keep 14 bits for 128 numbers: 0.06 % if all have one sign (tests/kernels/hopper_sums.py)."""

RowsByBlocks = Callable[[Quantized, QuantizedBlocks, torch.dtype], Tensor]
Columns = Callable[[QuantizedColumns, QuantizedColumns], Tensor]


def random_codes(generator: torch.Generator, num_rows: int, num_columns: int) -> Tensor:
    """Returns random codes except NaN, uniformly: zeros of both signs and subnormal numbers are among them."""
    bits = torch.randint(0, 254, (num_rows, num_columns), generator=generator)
    return (bits + (bits >= 127)).to(torch.uint8).view(torch.float8_e4m3fn)


def random_scales(generator: torch.Generator, num_rows: int, num_columns: int) -> Tensor:
    """Scales over four orders of magnitude."""
    return torch.exp(torch.randn(num_rows, num_columns, generator=generator) * 2) * 1e-3


def operands(shape: tuple[int, int, int], seed: int = 0) -> tuple[Quantized, QuantizedBlocks]:
    """Returns random codes and scales of M x K and, by blocks, N x K."""
    num_rows, num_outputs, depth = shape
    generator = torch.Generator().manual_seed(seed + sum(shape))
    tiles = num_tiles(depth)
    left = Quantized(random_codes(generator, num_rows, depth), random_scales(generator, num_rows, tiles))
    scales = random_scales(generator, num_tiles(num_outputs), tiles)
    return left, QuantizedBlocks(random_codes(generator, num_outputs, depth), scales)


def column_operands(shape: tuple[int, int, int], seed: int = 0) -> tuple[QuantizedColumns, QuantizedColumns]:
    """Returns random codes and scales of M x P and N x P."""
    num_rows, num_outputs, depth = shape
    generator = torch.Generator().manual_seed(seed + sum(shape))
    made = (
        QuantizedColumns(random_codes(generator, rows, depth), random_scales(generator, rows, num_tiles(depth)))
        for rows in (num_rows, num_outputs)
    )
    return next(made), next(made)


def values(codes: Tensor, scales: Tensor, rows_to_a_scale: int) -> Tensor:
    """Codes times scales in float64, by index arithmetic of its own."""
    rows, columns = (torch.arange(size) for size in codes.shape)
    return codes.double() * scales.double()[rows[:, None] // rows_to_a_scale, columns[None, :] // 128]


def assert_product(actual: Tensor, left_MK: Tensor, right_NK: Tensor, sums: float) -> None:
    """Asserts that a product equals that of float64 values up to errors of the sums and one rounding.

    Args:
        actual: [M, N].
        left_MK: float64.
        right_NK: float64.
        sums: what adding may cost, relative to the sum of magnitudes.
    """
    exact_MN, magnitudes_MN = left_MK @ right_NK.t(), left_MK.abs() @ right_NK.abs().t()
    assert actual.shape == exact_MN.shape
    allowed_MN = sums * magnitudes_MN + ROUNDING[actual.dtype] * exact_MN.abs()
    excess_MN = (actual.cpu().double() - exact_MN).abs() - allowed_MN
    assert (excess_MN <= 0).all(), f"beyond by {excess_MN.max()} at {excess_MN.argmax()} of {list(exact_MN.shape)}"


def check_gemm(
    gemm: RowsByBlocks, device: str, shape: tuple[int, int, int], dtype: torch.dtype, sums: float = FLOAT32_SUMS
) -> None:
    """Checks a product by blocks against the exact one."""
    left, right = operands(shape)
    there = Quantized(*(each.to(device) for each in left)), QuantizedBlocks(*(each.to(device) for each in right))
    actual = gemm(*there, dtype)
    assert actual.dtype == dtype
    assert_product(actual, values(*left, 1), values(*right, 128), sums)


def check_columns(gemm: Columns, device: str, shape: tuple[int, int, int], sums: float = FLOAT32_SUMS) -> None:
    """Checks a product with scales by row on both sides against the exact one."""
    left, right = column_operands(shape)
    there = (QuantizedColumns(*(each.to(device) for each in operand)) for operand in (left, right))
    actual = gemm(*there)
    assert actual.dtype == torch.float32
    assert_product(actual, values(*left, 1), values(*right, 1), sums)


def check_nan(gemm: RowsByBlocks, columns: Columns, device: str) -> None:
    """Checks that a NaN in one left tile or one right block affects only its row or its columns."""
    left, right = operands((70, 200, 300))
    left.codes.view(torch.uint8)[3, 128:256] = 0x7F
    left.scales[3, 1] = torch.nan
    right.codes.view(torch.uint8)[128:, 256:] = 0x7F
    right.scales[1, 2] = torch.nan
    left.scales[5, 0] = torch.nan  # the scale alone, as of a tile of zeros
    there = Quantized(*(each.to(device) for each in left)), QuantizedBlocks(*(each.to(device) for each in right))
    expected = torch.zeros(70, 200, dtype=torch.bool)
    expected[[3, 5]] = True
    expected[:, 128:] = True
    assert torch.equal(gemm(*there, torch.float32).isnan().cpu(), expected)
    first, second = column_operands((40, 50, 256))
    first.codes.view(torch.uint8)[7, 128] = 0xFF
    second.scales[9, 0] = torch.nan
    there_too = (QuantizedColumns(*(each.to(device) for each in operand)) for operand in (first, second))
    expected = torch.zeros(40, 50, dtype=torch.bool)
    expected[7] = True
    expected[:, 9] = True
    assert torch.equal(columns(*there_too).isnan().cpu(), expected)


def check_empty(gemm: RowsByBlocks, columns: Columns, device: str) -> None:
    """Operands without rows, outputs or numbers of K give a result of the right shape, zeros if it has elements."""
    for shape in ((0, 5, 130), (5, 0, 130), (5, 6, 0), (0, 0, 0)):
        left, right = operands(shape)
        there = Quantized(*(each.to(device) for each in left)), QuantizedBlocks(*(each.to(device) for each in right))
        made = gemm(*there, torch.bfloat16)
        assert made.dtype == torch.bfloat16
        assert made.cpu().equal(torch.zeros(shape[:2], dtype=torch.bfloat16))
    for shape in ((0, 5, 128), (5, 6, 0)):
        there_too = (QuantizedColumns(*(each.to(device) for each in operand)) for operand in column_operands(shape))
        assert columns(*there_too).cpu().equal(torch.zeros(shape[:2]))
