"""The reference of the quantization by columns against numpy element by element, and the laws it must obey.

Shape legend: N rows, D columns, P rows once every group is filled up to whole tiles.
"""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.quantize.layout import GRADIENTS_MIN_AMAX, Quantized, QuantizedColumns, padded_rows
from kernels.quantize.reference import dequantize_1x128, quantize_1x128
from kernels.quantize.reference_columns import quantize_columns, requantize_columns
from tests.kernels.agreement import assert_same_bits
from tests.kernels.agreement_formats import assert_same_pair, wild_columns
from tests.kernels.test_quantize import NAN_CODE, expected_tile

COUNTS = [[0, 130, 1, 0, 127, 256, 0], [128], [5]]


def normal_rows(num_rows: int, num_columns: int, seed: int) -> Tensor:
    return torch.randn(num_rows, num_columns, generator=torch.Generator().manual_seed(seed))


def expected_columns(rows_ND: Tensor, counts: Sequence[int], power_of_two: bool, min_amax: float) -> QuantizedColumns:
    codes, scales, first = [], [], 0
    for count in counts:
        for start in range(first, first + count, 128):
            tile = rows_ND[start : min(start + 128, first + count)].float().numpy()
            filled = np.pad(tile, ((0, 128 - len(tile)), (0, 0)))
            made = [expected_tile(column, power_of_two, min_amax) for column in filled.T]
            codes.append(np.stack([code for code, _ in made]))
            scales.append(np.array([scale for _, scale in made], np.float32))
        first += count
    codes_DP = torch.from_numpy(np.concatenate(codes, axis=1)).view(torch.float8_e4m3fn)
    return QuantizedColumns(codes_DP, torch.from_numpy(np.stack(scales, axis=1)))


def values_of(columns: QuantizedColumns, counts: Sequence[int]) -> Tensor:
    """Returns rows_ND in float64, without the padding."""
    values_PD = dequantize_1x128(Quantized(*columns), torch.float64).t()
    kept, first = [], 0
    for count in counts:
        kept.append(values_PD[first : first + count])
        first += padded_rows([count])
    return torch.cat(kept)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_columns_equal_an_independent_formula(counts: list[int], power_of_two: bool, dtype: torch.dtype) -> None:
    wide_ND = wild_columns(torch.Generator().manual_seed(len(counts)), sum(counts), 40, dtype)
    for min_amax in (1e-4, GRADIENTS_MIN_AMAX):
        for rows_ND in (wide_ND, wide_ND[:, 3:36]):
            made = quantize_columns(rows_ND, counts, power_of_two=power_of_two, min_amax=min_amax)
            assert_same_pair(made, expected_columns(rows_ND, counts, power_of_two, min_amax))
    assert 0.03 < made.scales.isnan().float().mean() < 0.9


@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("num_columns", [1, 130, 300])
def test_requantizing_is_quantizing_what_the_codes_mean(power_of_two: bool, num_columns: int) -> None:
    counts = [100, 0, 130]
    by_rows = quantize_1x128(
        wild_columns(torch.Generator().manual_seed(1), 230, num_columns, torch.float32), power_of_two=power_of_two
    )
    expected = quantize_columns(
        dequantize_1x128(by_rows, torch.float32), counts, power_of_two=power_of_two, min_amax=2.0**-100
    )
    assert_same_pair(requantize_columns(by_rows, counts, power_of_two=power_of_two, min_amax=2.0**-100), expected)


def test_requantizing_powers_of_two_is_exact_if_exponents_allow_it() -> None:
    counts = [100, 156]
    rows_ND = normal_rows(256, 200, 2) * torch.logspace(-6, 6, 256, base=2)[:, None]
    by_rows = quantize_1x128(rows_ND, power_of_two=True, min_amax=GRADIENTS_MIN_AMAX)
    by_columns = requantize_columns(by_rows, counts, power_of_two=True, min_amax=GRADIENTS_MIN_AMAX)
    before_ND, after_ND = dequantize_1x128(by_rows, torch.float64), values_of(by_columns, counts)
    scales_ND = values_of(
        QuantizedColumns(torch.ones_like(by_columns.codes.float()).to(by_columns.codes.dtype), by_columns.scales),
        counts,
    )
    normal_ND = before_ND.abs() >= scales_ND * 2.0**-6
    assert 0.9 < normal_ND.double().mean() < 1
    assert torch.equal(after_ND[normal_ND], before_ND[normal_ND])
    # Without it, scales that are no powers of two shift the codes' steps.
    plain = requantize_columns(quantize_1x128(rows_ND, power_of_two=False), counts, power_of_two=False)
    assert (
        values_of(plain, counts) != dequantize_1x128(quantize_1x128(rows_ND, power_of_two=False), torch.float64)
    ).double().mean() > 0.3


@pytest.mark.parametrize("power_of_two", [True, False])
def test_error_is_within_half_a_step_of_the_code(power_of_two: bool) -> None:
    counts = [130, 70]
    rows_ND = normal_rows(200, 64, 3) * torch.logspace(-6, 6, 64)
    made = quantize_columns(rows_ND, counts, power_of_two=power_of_two, min_amax=GRADIENTS_MIN_AMAX)
    ones = torch.ones(made.codes.shape).to(made.codes.dtype)
    scales_ND = values_of(QuantizedColumns(ones, made.scales), counts)
    # 3 bits of mantissa: 2**-4 of the number, or half of the smallest code, 2**-9.
    allowed_ND = torch.maximum(rows_ND.double().abs() * 2.0**-4, scales_ND * 2.0**-10) * (1 + 2.0**-20)
    assert ((values_of(made, counts) - rows_ND).abs() <= allowed_ND).all()


def test_permuting_rows_of_a_tile_permutes_its_codes() -> None:
    rows_ND = normal_rows(128, 30, 4)
    order_N = torch.randperm(128, generator=torch.Generator().manual_seed(5))
    made, permuted = (quantize_columns(rows, [128], power_of_two=False) for rows in (rows_ND, rows_ND[order_N]))
    assert_same_bits(permuted.scales, made.scales)
    assert_same_bits(permuted.codes.view(torch.uint8), made.codes.view(torch.uint8)[:, order_N])


def test_a_group_is_quantized_as_if_alone() -> None:
    counts = [50, 0, 128, 200]
    groups = [normal_rows(count, 20, count) for count in counts]
    made = quantize_columns(torch.cat(groups), counts, power_of_two=False)
    single = [quantize_columns(rows, [len(rows)], power_of_two=False) for rows in groups]
    codes_DP = torch.cat([part.codes.view(torch.uint8) for part in single], 1)
    assert_same_bits(made.codes.view(torch.uint8), codes_DP)
    assert_same_bits(made.scales, torch.cat([part.scales for part in single], 1))


@pytest.mark.parametrize("poison", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_one_number_that_is_not_finite_poisons_its_tile_alone(poison: float) -> None:
    rows_ND, counts = normal_rows(300, 20, 6), [100, 200]
    clean = quantize_columns(rows_ND, counts, power_of_two=True)
    rows_ND[120, 7] = poison  # the second tile: row 120 is of the second group
    made = quantize_columns(rows_ND, counts, power_of_two=True)
    clean.codes.view(torch.uint8)[7, 128:256] = NAN_CODE
    clean.scales[7, 1] = math.nan
    assert_same_pair(made, clean)
    assert values_of(made, counts)[100:228, 7].isnan().all()


@pytest.mark.parametrize(("counts", "num_columns"), [([0, 0], 5), ([], 5), ([3], 0), ([0], 0)])
def test_columns_of_nothing_have_their_shapes(counts: list[int], num_columns: int) -> None:
    rows_ND = torch.ones(sum(counts), num_columns)
    tiles = padded_rows(counts) // 128
    for made in (
        quantize_columns(rows_ND, counts, power_of_two=True),
        requantize_columns(quantize_1x128(rows_ND, power_of_two=True), counts, power_of_two=True),
    ):
        assert made.codes.shape == (num_columns, 128 * tiles)
        assert made.codes.dtype == torch.float8_e4m3fn
        assert made.scales.shape == (num_columns, tiles)
        assert made.scales.dtype == torch.float32


def test_counts_that_do_not_match_the_rows_are_rejected() -> None:
    rows_ND = torch.ones(4, 2)
    with pytest.raises(ValueError, match="quantize_columns: counts must add up to the number of rows, 4, got 3"):
        quantize_columns(rows_ND, [1, 2], power_of_two=True)
    with pytest.raises(
        ValueError, match="requantize_columns: a count of rows must not be negative, got -1; nearest: 0"
    ):
        requantize_columns(quantize_1x128(rows_ND, power_of_two=True), [5, -1], power_of_two=True)
    with pytest.raises(ValueError, match=r"min_amax must be in \[2\*\*-117, 2\*\*127\], got 0"):
        quantize_columns(rows_ND, [4], power_of_two=True, min_amax=0.0)
