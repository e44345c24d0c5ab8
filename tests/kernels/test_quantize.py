"""The reference of the 1x128 quantization against numpy, a table of all codes, and the laws it must obey.

Shape legend: N rows, D columns, T tiles in a row.
"""

import math
import re

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.quantize.layout import Quantized
from kernels.quantize.reference import CHUNK_NUMBERS, dequantize_1x128, quantize_1x128
from tests.kernels.agreement import assert_same_bits, wild_rows

NAN_CODE = 0x7F


def code_values() -> np.ndarray:
    """Returns the 127 finite, non-negative e4m3 numbers by definition: sign, 4 bits of exponent, 3 of mantissa."""
    values = [
        (mantissa / 8) * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        for exponent in range(16)
        for mantissa in range(8)
    ]
    return np.array(values[:NAN_CODE])


def nearest_codes(numbers: np.ndarray) -> np.ndarray:
    """Returns the code nearest to each finite number, ties to the even code, by search among all of them."""
    values = code_values()
    magnitudes = np.minimum(np.abs(numbers.astype(np.float64)), 448)
    above = np.searchsorted(values, magnitudes)
    below = np.maximum(above - 1, 0)
    to_above, to_below = values[above] - magnitudes, magnitudes - values[below]
    codes = np.where((to_above < to_below) | ((to_above == to_below) & (above % 2 == 0)), above, below)
    return np.where(np.signbit(numbers), codes + 128, codes).astype(np.uint8)


def expected_tile(tile: np.ndarray, power_of_two: bool, min_amax: float) -> tuple[np.ndarray, float]:
    if not np.isfinite(tile).all():
        return np.full(tile.shape, NAN_CODE, np.uint8), math.nan
    scale = np.float32(max(np.abs(tile).max(), np.float32(min_amax))) / np.float32(448)
    if power_of_two:
        mantissa, exponent = math.frexp(float(scale))
        scale = np.float32(math.ldexp(1.0, exponent - 1 if mantissa == 0.5 else exponent))
    return nearest_codes(tile / scale), float(scale)


def expected_quantized(rows_ND: Tensor, power_of_two: bool, min_amax: float) -> Quantized:
    rows, num_columns = rows_ND.float().numpy(), rows_ND.shape[1]
    codes = np.zeros(rows.shape, np.uint8)
    scales = np.zeros((rows.shape[0], math.ceil(num_columns / 128)), np.float32)
    for row in range(rows.shape[0]):
        for tile in range(scales.shape[1]):
            columns = slice(128 * tile, 128 * (tile + 1))
            codes[row, columns], scales[row, tile] = expected_tile(rows[row, columns], power_of_two, min_amax)
    return Quantized(torch.from_numpy(codes).view(torch.float8_e4m3fn), torch.from_numpy(scales))


def assert_same(actual: Quantized, expected: Quantized) -> None:
    assert_same_bits(actual.codes, expected.codes)
    assert_same_bits(actual.scales, expected.scales)


@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("num_columns", [1, 127, 128, 129, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_and_scales_equal_an_independent_formula(
    power_of_two: bool, num_columns: int, dtype: torch.dtype
) -> None:
    wide_ND = wild_rows(torch.Generator().manual_seed(num_columns), 96, num_columns + 3).to(dtype)
    for min_amax in (1e-4, 2.0**-100, 2.0**-117):
        rows_ND = wide_ND[:, :num_columns].contiguous()
        expected = expected_quantized(rows_ND, power_of_two, min_amax)
        assert_same(quantize_1x128(rows_ND, power_of_two=power_of_two, min_amax=min_amax), expected)
        view_ND = wide_ND[:, 2 : 2 + num_columns]
        assert_same(
            quantize_1x128(view_ND, power_of_two=power_of_two, min_amax=min_amax),
            quantize_1x128(view_ND.clone(), power_of_two=power_of_two, min_amax=min_amax),
        )
    assert 0.03 < expected.scales.isnan().float().mean() < 0.9


def test_quantization_of_more_than_a_chunk_equals_row_by_row() -> None:
    num_rows = CHUNK_NUMBERS // 7168 + 2
    rows_ND = torch.randn(num_rows, 7168, generator=torch.Generator().manual_seed(0)).bfloat16()
    whole = quantize_1x128(rows_ND, power_of_two=True)
    single = [quantize_1x128(row_D[None], power_of_two=True) for row_D in rows_ND]
    codes_ND = torch.cat([row.codes.view(torch.uint8) for row in single]).view(torch.float8_e4m3fn)
    assert_same(whole, Quantized(codes_ND, torch.cat([row.scales for row in single])))
    rows = torch.cat([dequantize_1x128(row, torch.bfloat16) for row in single])
    assert_same_bits(dequantize_1x128(whole, torch.bfloat16), rows)


@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("poison", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_one_number_that_is_not_finite_poisons_its_tile_alone(power_of_two: bool, poison: float) -> None:
    rows_ND = torch.randn(3, 300, generator=torch.Generator().manual_seed(1))
    clean = quantize_1x128(rows_ND, power_of_two=power_of_two)
    rows_ND[1, 290] = poison
    quantized = quantize_1x128(rows_ND, power_of_two=power_of_two)
    assert quantized.scales.isnan().nonzero().tolist() == [[1, 2]]
    assert (quantized.codes.view(torch.uint8)[1, 256:] == NAN_CODE).all()
    clean.codes.view(torch.uint8)[1, 256:] = NAN_CODE
    clean.scales[1, 2] = torch.nan
    assert_same(quantized, clean)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        values_ND = dequantize_1x128(quantized, dtype)
        assert values_ND[1, 256:].isnan().all()
        assert values_ND.isnan().sum() == 44


@pytest.mark.parametrize("min_amax", [1e-4, 2.0**-100, 2.0**-117])
def test_scales_never_underflow(min_amax: float) -> None:
    exponents = torch.arange(-149, -90)
    rows_ND = torch.ldexp(torch.ones(len(exponents), 128, dtype=torch.float64), exponents[:, None]).float()
    rows_ND = torch.cat([rows_ND, torch.zeros(1, 128), torch.full((1, 128), -0.0)])
    for power_of_two in (True, False):
        quantized = quantize_1x128(rows_ND, power_of_two=power_of_two, min_amax=min_amax)
        assert (quantized.scales >= 2.0**-126).all()
        assert (quantized.scales.double() >= min_amax / 448 * (1 - 2.0**-23)).all()
        assert quantized.codes.view(torch.uint8)[-2].eq(0).all()
        assert (dequantize_1x128(quantized, torch.float32)[-2:] == 0).all()


@pytest.mark.parametrize("min_amax", [0.0, -1.0, 2.0**-118, 1e-40, math.nan, math.inf, 1e39])
def test_a_min_amax_without_a_normal_scale_is_rejected(min_amax: float) -> None:
    nearest = "2**127" if min_amax > 1 else "2**-117"
    message = f"quantize_1x128: min_amax must be in [2**-117, 2**127], got {min_amax}; nearest: {nearest}"
    with pytest.raises(ValueError, match=re.escape(message)):
        quantize_1x128(torch.ones(1, 1), power_of_two=True, min_amax=min_amax)


@pytest.mark.parametrize("min_amax", [1e-4, 2.0**-100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantizing_again_with_powers_of_two_loses_nothing(min_amax: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    exponents = torch.randint(-110, 110, (400, 1), generator=generator)
    rows_ND = torch.ldexp(torch.randn(400, 129, generator=generator), exponents)
    once_ND = dequantize_1x128(quantize_1x128(rows_ND, power_of_two=True, min_amax=min_amax), dtype)
    again = quantize_1x128(once_ND, power_of_two=True, min_amax=min_amax)
    assert_same_bits(dequantize_1x128(again, dtype), once_ND)
    # An amax just above 224 scales rounds down to 224 of them, so a scale may halve, once; then it stays.
    third = quantize_1x128(dequantize_1x128(again, dtype), power_of_two=True, min_amax=min_amax)
    assert_same(third, again)


@pytest.mark.parametrize("power_of_two", [True, False])
def test_error_is_within_half_a_step_of_the_code(power_of_two: bool) -> None:
    rows_ND = torch.randn(200, 256, generator=torch.Generator().manual_seed(3)) * torch.logspace(-6, 6, 256)
    quantized = quantize_1x128(rows_ND, power_of_two=power_of_two)
    error_ND = (dequantize_1x128(quantized, torch.float64) - rows_ND).abs()
    scales_ND = quantized.scales.double().repeat_interleave(128, dim=1)
    # 3 bits of mantissa: 2**-4 of the number, or half of the smallest code, 2**-9.
    allowed_ND = torch.maximum(rows_ND.double().abs() * 2.0**-4, scales_ND * 2.0**-10) * (1 + 2.0**-20)
    assert (error_ND <= allowed_ND).all()


def test_numbers_beyond_float32_poison_their_tile() -> None:
    rows_ND = torch.tensor([[1e300, 1.0], [1e30, 1.0]], dtype=torch.float64)
    quantized = quantize_1x128(rows_ND, power_of_two=False)
    assert quantized.scales.isnan().tolist() == [[True], [False]]
    assert_same(quantized, quantize_1x128(rows_ND.float(), power_of_two=False))


def test_dequantization_is_the_product_rounded() -> None:
    quantized = expected_quantized(wild_rows(torch.Generator().manual_seed(4), 64, 257), False, 2.0**-100)
    finite_N = quantized.scales.isfinite().all(dim=1)
    codes = quantized.codes.view(torch.uint8)[finite_N].numpy()
    scales = quantized.scales[finite_N].numpy()
    signed = np.concatenate([code_values(), [np.nan], -code_values(), [np.nan]])[codes]
    for dtype, wide in ((torch.float32, np.float32), (torch.bfloat16, np.float32), (torch.float64, np.float64)):
        product = np.empty(codes.shape, wide)
        for column in range(257):
            product[:, column] = signed[:, column].astype(wide) * scales[:, column // 128].astype(wide)
        kept = Quantized(quantized.codes[finite_N], quantized.scales[finite_N])
        assert_same_bits(dequantize_1x128(kept, dtype), torch.from_numpy(product).to(dtype))


@pytest.mark.parametrize(("num_rows", "num_columns"), [(0, 128), (0, 1), (3, 0), (0, 0)])
def test_quantization_of_nothing_has_its_shapes(num_rows: int, num_columns: int) -> None:
    quantized = quantize_1x128(torch.ones(num_rows, num_columns), power_of_two=True)
    assert quantized.codes.shape == (num_rows, num_columns)
    assert quantized.codes.dtype == torch.float8_e4m3fn
    assert quantized.scales.shape == (num_rows, math.ceil(num_columns / 128))
    assert dequantize_1x128(quantized, torch.bfloat16).shape == (num_rows, num_columns)
