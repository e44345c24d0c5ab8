"""The reference of the 128x128 quantization against numpy element by element, and the laws it must obey.

Shape legend: N rows, D columns.
"""

import math

import numpy as np
import pytest
import torch

from kernels.quantize.layout import QuantizedBlocks
from kernels.quantize.reference import codes_128x128, dequantize_128x128, quantize_128x128, transpose_blocks
from tests.kernels.agreement import assert_same_bits, wild_rows
from tests.kernels.test_quantize import NAN_CODE, nearest_codes

SHAPES = [(1, 1), (127, 130), (128, 128), (129, 127), (192, 96), (300, 257), (576, 40)]


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


@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_and_scales_equal_an_independent_formula(
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


def test_error_of_a_quantized_weight_is_at_most_half_a_step() -> None:
    values_ND = torch.randn(200, 300, generator=torch.Generator().manual_seed(4))
    back_ND = dequantize_128x128(quantize_128x128(values_ND, power_of_two=False), torch.float32)
    # Four significant bits: half a step is 2^-4 of the value; below the smallest normal code, half of 2^-9 scales.
    smallest = values_ND.abs().amax() / 448 * 2.0**-10
    assert ((back_ND - values_ND).abs() <= values_ND.abs() * 2.0**-4 + smallest).all()


def test_a_block_that_is_not_finite_leaves_the_others_alone() -> None:
    values_ND = torch.randn(200, 300, generator=torch.Generator().manual_seed(5))
    clean = quantize_128x128(values_ND, power_of_two=False)
    values_ND[150, 290] = torch.inf
    made = quantize_128x128(values_ND, power_of_two=False)
    assert made.scales.isnan().nonzero().tolist() == [[1, 2]]
    assert (made.codes.view(torch.uint8)[128:, 256:] == NAN_CODE).all()
    assert_same_bits(made.codes[:128].contiguous(), clean.codes[:128].contiguous())
    assert_same_bits(made.codes[:, :256].contiguous(), clean.codes[:, :256].contiguous())


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_a_matrix_of_no_elements_has_no_codes(shape: tuple[int, int]) -> None:
    made = quantize_128x128(torch.empty(shape), power_of_two=False)
    assert made.codes.shape == shape
    assert made.scales.shape == (math.ceil(shape[0] / 128), math.ceil(shape[1] / 128))
    assert dequantize_128x128(made, torch.float32).shape == shape


def test_a_bound_from_which_scales_underflow_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"min_amax must be in \[2\*\*-117, 2\*\*127\], got 0"):
        quantize_128x128(torch.ones(2, 2), power_of_two=False, min_amax=0.0)


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


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_matrices_of_no_elements_have_no_codes(shape: tuple[int, int, int]) -> None:
    made = quantize_128x128(torch.empty(shape), power_of_two=False)
    assert made.codes.shape == shape
    assert made.scales.shape == (shape[0], math.ceil(shape[1] / 128), math.ceil(shape[2] / 128))
    assert dequantize_128x128(made, torch.float32).shape == shape
    assert transpose_blocks(made).codes.shape == (shape[0], shape[2], shape[1])
