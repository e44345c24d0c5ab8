"""Grouped operands in FP8 and in 16 bits, and how near a grouped product must come to the exact one.

Shape legend: A rows (all groups together), P rows once every group is filled up to whole tiles, E groups, K and N inner
and outer width.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from kernels.quantize.layout import Quantized, QuantizedBlocks, QuantizedColumns, num_tiles, padded_rows
from tests.kernels.agreement_gemm import FLOAT32_SUMS, assert_product, random_codes, random_scales, values
from tests.kernels.plain import randn

Counts = Sequence[int]
RowsFp8 = Callable[[Quantized, QuantizedBlocks, Counts, torch.dtype], Tensor]
WeightFp8 = Callable[[QuantizedColumns, QuantizedColumns, Counts], Tensor]
Product = Callable[[Tensor, Tensor, Counts], Tensor]
Operand = TypeVar("Operand", Quantized, QuantizedBlocks, QuantizedColumns)
NAN_BITS = 0x7F


def operands(counts: Counts, num_outputs: int, depth: int) -> tuple[Quantized, QuantizedBlocks]:
    """Returns random codes and scales of A x K and, by blocks, E x N x K."""
    generator = torch.Generator().manual_seed(sum(counts) + num_outputs + depth)
    num_rows, num_groups, tiles = sum(counts), len(counts), num_tiles(depth)
    rows = Quantized(random_codes(generator, num_rows, depth), random_scales(generator, num_rows, tiles))
    codes = random_codes(generator, num_groups * num_outputs, depth)
    scales = random_scales(generator, num_groups * num_tiles(num_outputs), tiles)
    shape = (num_groups, num_tiles(num_outputs), tiles)
    return rows, QuantizedBlocks(codes.view(num_groups, num_outputs, depth), scales.view(shape))


def column_operands(counts: Counts, num_outputs: int, depth: int) -> tuple[QuantizedColumns, QuantizedColumns]:
    """Returns random codes and scales of N x P and K x P; the padding is zero."""
    generator = torch.Generator().manual_seed(sum(counts) + num_outputs + depth)
    num_padded = padded_rows(counts)
    made = []
    for width in (num_outputs, depth):
        codes = random_codes(generator, width, num_padded)
        first = 0
        for count in counts:
            codes[:, first + count : first + padded_rows([count])] = 0
            first += padded_rows([count])
        made.append(QuantizedColumns(codes, random_scales(generator, width, num_padded // 128)))
    return made[0], made[1]


def segments(counts: Counts) -> list[slice]:
    ends = [sum(counts[: group + 1]) for group in range(len(counts))]
    return [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]


def padded_segments(counts: Counts) -> list[slice]:
    """Returns the rows of each group after padding."""
    return segments([padded_rows([count]) for count in counts])


def check_rows_fp8(
    product: RowsFp8,
    device: str,
    counts: Counts,
    widths: tuple[int, int],
    dtype: torch.dtype,
    sums: float = FLOAT32_SUMS,
) -> None:
    """Checks each group's rows times its matrix, N x K, against the exact product."""
    rows, weights = operands(counts, *widths)
    actual_AN = product(on(device, rows), on(device, weights), counts, dtype)
    assert actual_AN.dtype == dtype
    assert actual_AN.shape == (sum(counts), widths[0])
    for group, part in enumerate(segments(counts)):
        matrix = values(weights.codes[group], weights.scales[group], 128)
        assert_product(actual_AN[part], values(rows.codes[part], rows.scales[part], 1), matrix, sums)


def check_weight_fp8(
    product: WeightFp8, device: str, counts: Counts, widths: tuple[int, int], sums: float = FLOAT32_SUMS
) -> None:
    """Checks the gradient of each group's matrix, N x K, against the exact product; zeros for an empty group."""
    grad, rows = column_operands(counts, *widths)
    actual_ENK = product(on(device, grad), on(device, rows), counts)
    assert actual_ENK.dtype == torch.float32
    assert actual_ENK.shape == (len(counts), *widths)
    left_NP, right_KP = values(*grad, 1), values(*rows, 1)
    for group, part in enumerate(padded_segments(counts)):
        assert_product(actual_ENK[group], left_NP[:, part], right_KP[:, part], sums)


def on(device: str, operand: Operand) -> Operand:
    return type(operand)(*(each.to(device) for each in operand))


def check_nan_fp8(rows_product: RowsFp8, weight_product: WeightFp8, device: str) -> None:
    """Checks that a NaN in a row, a block or a column affects only the results of its own group."""
    counts = (3, 130, 0, 5)
    rows, weights = operands(counts, 150, 200)
    rows.codes.view(torch.uint8)[4, 130:] = NAN_BITS
    rows.scales[4, 1] = torch.nan
    rows.scales[137, 0] = torch.nan
    weights.codes.view(torch.uint8)[1, 128:, :128] = NAN_BITS
    weights.scales[1, 1, 0] = torch.nan
    weights.scales[2] = torch.nan  # of no rows
    expected_AN = torch.zeros(sum(counts), 150, dtype=torch.bool)
    expected_AN[[4, 137]] = True
    expected_AN[3:133, 128:] = True
    actual_AN = rows_product(on(device, rows), on(device, weights), counts, torch.float32)
    assert torch.equal(actual_AN.isnan().cpu(), expected_AN)
    grad, inputs = column_operands(counts, 40, 50)
    grad.codes.view(torch.uint8)[7, :128] = NAN_BITS
    grad.scales[7, 0] = torch.nan
    inputs.scales[9, 3] = torch.nan
    expected_ENK = torch.zeros(4, 40, 50, dtype=torch.bool)
    expected_ENK[0, 7] = True
    expected_ENK[3, :, 9] = True
    actual_ENK = weight_product(on(device, grad), on(device, inputs), counts)
    assert torch.equal(actual_ENK.isnan().cpu(), expected_ENK)


def check_empty_fp8(rows_product: RowsFp8, weight_product: WeightFp8, device: str) -> None:
    """Operands without rows, outputs or numbers of K give a result of the right shape, zeros if it has elements."""
    for counts, widths in (((0, 0), (5, 130)), ((2, 3), (0, 130)), ((2, 0), (5, 0)), ((), (5, 130))):
        rows, weights = operands(counts, *widths)
        made_AN = rows_product(on(device, rows), on(device, weights), counts, torch.bfloat16)
        assert made_AN.cpu().equal(torch.zeros(sum(counts), widths[0], dtype=torch.bfloat16))
        grad, inputs = column_operands(counts, *widths)
        made_ENK = weight_product(on(device, grad), on(device, inputs), counts)
        assert made_ENK.shape == (len(counts), *widths)
        assert sum(counts) > 0 or not made_ENK.any()


def check_nan(rows_product: Product, weight_product: Product, device: str) -> None:
    """Checks that NaN and infinity in one group affect only the results of that group."""
    counts = (3, 70, 0, 5)
    rows_AK, weight_ENK = randn(78, 40, seed=0).bfloat16(), randn(4, 24, 40, seed=1).bfloat16()
    rows_AK[3, 5] = torch.nan
    rows_AK[72, 39] = torch.inf
    weight_ENK[2] = torch.nan
    weight_ENK[3, 23, 0] = torch.nan
    expected_AN = torch.zeros(78, 24, dtype=torch.bool)
    expected_AN[[3, 72]] = True
    expected_AN[73:, 23] = True
    for weights in (weight_ENK, weight_ENK.transpose(1, 2).contiguous().transpose(1, 2)):
        actual_AN = rows_product(rows_AK.to(device), weights.to(device), counts)
        assert torch.equal(~actual_AN.isfinite().cpu(), expected_AN)
    grad_AN = randn(78, 24, seed=2).bfloat16()
    grad_AN[73, 7] = torch.nan
    actual_ENK = weight_product(grad_AN.to(device), rows_AK.to(device), counts)
    expected_ENK = torch.zeros(4, 24, 40, dtype=torch.bool)
    expected_ENK[1, :, [5, 39]] = True
    expected_ENK[3, 7] = True
    assert torch.equal(~actual_ENK.isfinite().cpu(), expected_ENK)
