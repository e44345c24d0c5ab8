"""The references of the quantizations against numpy, a table of all codes, and the laws they must obey.

Shape legend: N rows, D columns, T tiles in a row, P rows once every group is filled up to whole tiles.
"""

import math
import re
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.quantize.layout import GRADIENTS_MIN_AMAX, Quantized, QuantizedBlocks, QuantizedColumns, padded_rows
from kernels.quantize.reference import (
    CHUNK_NUMBERS,
    codes_128x128,
    dequantize_1x128,
    dequantize_128x128,
    quantize_1x128,
    quantize_128x128,
    quantize_columns,
    requantize_columns,
    transpose_blocks,
)
from tests.kernels.agreement import assert_same_bits, wild_rows
from tests.kernels.agreement_formats import assert_same_pair, wild_columns

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


@pytest.mark.covering(2)
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


@pytest.mark.parametrize("min_amax", [0.0, 2.0**-118, math.nan, 1e39])
def test_a_min_amax_without_a_normal_scale_is_rejected(min_amax: float) -> None:
    nearest = "2**127" if min_amax > 1 else "2**-117"
    message = f"quantize_1x128: min_amax must be in [2**-117, 2**127], got {min_amax}; nearest: {nearest}"
    with pytest.raises(ValueError, match=re.escape(message)):
        quantize_1x128(torch.ones(1, 1), power_of_two=True, min_amax=min_amax)


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


@pytest.mark.parametrize(("num_rows", "num_columns"), [(0, 128), (3, 0)])
def test_quantization_of_nothing_has_its_shapes(num_rows: int, num_columns: int) -> None:
    quantized = quantize_1x128(torch.ones(num_rows, num_columns), power_of_two=True)
    assert quantized.codes.shape == (num_rows, num_columns)
    assert quantized.codes.dtype == torch.float8_e4m3fn
    assert quantized.scales.shape == (num_rows, math.ceil(num_columns / 128))
    assert dequantize_1x128(quantized, torch.bfloat16).shape == (num_rows, num_columns)


SHAPES = [(1, 1), (128, 128), (129, 127), (300, 257)]


def expected_blocks(values: np.ndarray, power_of_two: bool, min_amax: float) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = values.shape
    codes = np.zeros(values.shape, np.uint8)
    scales = np.zeros((math.ceil(rows / 128), math.ceil(columns / 128)), np.float32)
    for row, column in np.ndindex(*scales.shape):
        place = slice(128 * row, 128 * (row + 1)), slice(128 * column, 128 * (column + 1))
        block = values[place]
        if not np.isfinite(block).all():
            codes[place], scales[row, column] = NAN_CODE, math.nan
            continue
        scale = np.float32(max(np.abs(block).max(), np.float32(min_amax))) / np.float32(448)
        if power_of_two:
            mantissa, exponent = math.frexp(float(scale))
            scale = np.float32(math.ldexp(1.0, exponent - 1 if mantissa == 0.5 else exponent))
        codes[place], scales[row, column] = nearest_codes(block / scale), scale
    return codes, scales


@pytest.mark.covering(2)
@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_and_scales_equal_an_independent_formula_of_blocks(
    power_of_two: bool, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(shape[0])
    wild_ND = wild_rows(generator, shape[0], shape[1]).to(dtype)
    for values_ND in (wild_ND, torch.randn(shape, generator=generator).to(dtype)):
        made = quantize_128x128(values_ND, power_of_two=power_of_two)
        codes, scales = expected_blocks(values_ND.float().numpy(), power_of_two, 1e-4)
        assert_same_bits(made.codes, torch.from_numpy(codes).view(torch.float8_e4m3fn))
        assert_same_bits(made.scales, torch.from_numpy(scales))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_value_is_its_code_times_the_scale_of_its_block(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(shape[1])
    codes_ND = torch.randint(0, NAN_CODE, shape, generator=generator, dtype=torch.uint8).view(torch.float8_e4m3fn)
    scales = torch.rand(math.ceil(shape[0] / 128), math.ceil(shape[1] / 128), generator=generator) + 0.01
    made_ND = dequantize_128x128(QuantizedBlocks(codes_ND, scales), torch.float32)
    for row in range(0, shape[0], 31):
        for column in range(0, shape[1], 17):
            product = np.float32(codes_ND[row, column].float()) * np.float32(scales[row // 128, column // 128])
            assert made_ND[row, column].item() == product
    assert_same_bits(dequantize_128x128(QuantizedBlocks(codes_ND, scales), torch.bfloat16), made_ND.bfloat16())
    assert_same_bits(dequantize_128x128(QuantizedBlocks(codes_ND, scales), torch.float64), made_ND.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_code_comes_back_from_its_rounded_value(dtype: torch.dtype) -> None:
    """Weights read from FP8 and written again under the same scales keep their bytes, in bfloat16 as well."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != NAN_CODE].repeat(150)[: 190 * 180].view(190, 180).view(torch.float8_e4m3fn)
    scales = torch.rand(2, 2, generator=torch.Generator().manual_seed(3)) * 1e-3 + 1e-5
    values_ND = dequantize_128x128(QuantizedBlocks(codes, scales), dtype)
    assert_same_bits(codes_128x128(values_ND, scales), codes)


@pytest.mark.parametrize("power_of_two", [True, False])
def test_matrices_side_by_side_are_quantized_one_by_one(power_of_two: bool) -> None:
    values = torch.randn(2, 3, 200, 150, generator=torch.Generator().manual_seed(6)).transpose(0, 1)
    made = quantize_128x128(values, power_of_two=power_of_two)
    assert made.scales.shape == (3, 2, 2, 2)
    back = dequantize_128x128(made, torch.bfloat16)
    for place in np.ndindex(3, 2):
        single = quantize_128x128(values[place], power_of_two=power_of_two)
        assert_same_bits(made.codes[place], single.codes)
        assert_same_bits(made.scales[place], single.scales)
        assert_same_bits(back[place], dequantize_128x128(single, torch.bfloat16))


@pytest.mark.parametrize("shape", [(1, 1), (300, 257), (3, 130, 128)])
def test_the_transpose_of_blocks_is_the_blocks_of_the_transpose(shape: tuple[int, ...]) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    values[..., -1, 0] = torch.nan
    made = quantize_128x128(values, power_of_two=False)
    turned, expected = transpose_blocks(made), quantize_128x128(values.mT, power_of_two=False)
    again = transpose_blocks(turned)
    for actual, other in ((turned, expected), (again, made)):
        assert actual.codes.is_contiguous()
        assert actual.scales.is_contiguous()
        assert_same_bits(actual.codes, other.codes)
        assert_same_bits(actual.scales, other.scales)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 3, 4), (2, 3, 0)])
def test_matrices_of_no_elements_have_no_codes(shape: tuple[int, ...]) -> None:
    made = quantize_128x128(torch.empty(shape), power_of_two=False)
    *matrices, rows, columns = shape
    assert made.codes.shape == shape
    assert made.scales.shape == (*matrices, math.ceil(rows / 128), math.ceil(columns / 128))
    assert dequantize_128x128(made, torch.float32).shape == shape
    assert transpose_blocks(made).codes.shape == (*matrices, columns, rows)


COUNTS = [[0, 130, 1, 0, 127, 256, 0], [128], [5]]


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


@pytest.mark.covering(2)
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
