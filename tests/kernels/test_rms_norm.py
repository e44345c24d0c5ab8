"""RMSNorm and its backward against the formula in float64, and into FP8.

Shape legend: A rows, D columns.
"""

import pytest
import torch

from kernels.quantize.layout import Quantized
from kernels.quantize.reference import CHUNK_NUMBERS, dequantize_1x128, quantize_1x128
from kernels.rms_norm.reference import (
    inverse_rms,
    normalize,
    normalize_backward,
    rms_norm_backward_from_codes,
    rms_norm_quantize,
)
from tests.kernels.agreement import assert_same_bits
from tests.kernels.agreement_fused import EPS as FP8_EPS
from tests.kernels.agreement_fused import assert_codes_near, norm_inputs
from tests.kernels.plain import near, randn, rms_norm, strided

EPS = 1e-6
SHAPES = [(5, 7), (2, 3, 33), (1, 1), (0, 9), (1, 257), (130, 64)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.mark.covering(2)
@pytest.mark.parametrize("is_strided", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_and_gradients_equal_formula(shape: tuple[int, ...], dtype: torch.dtype, is_strided: bool) -> None:
    x, weight, grad = (randn(*size, seed=seed, dtype=dtype) for seed, size in enumerate([shape, shape[-1:], shape]))
    exact_x, exact_weight = (each.double().clone().requires_grad_() for each in (x, weight))
    expected = rms_norm(exact_x, exact_weight, EPS)
    expected.backward(grad.double())
    if is_strided:
        x, grad = strided(x), strided(grad)
    before = x.clone()
    scale = inverse_rms(x, EPS)
    made = normalize(x, scale, weight)
    grad_x, grad_weight = normalize_backward(grad, x, scale, weight)
    assert torch.equal(x, before)
    assert scale.dtype == torch.promote_types(dtype, torch.float32)
    assert {made.dtype, grad_x.dtype, grad_weight.dtype} == {dtype}
    assert exact_x.grad is not None
    assert exact_weight.grad is not None
    near(made, expected.detach(), 3)  # rounded after the normalization and after the weight
    # Of a row of one number the slope is next to nothing: a difference of two that are not.
    terms = grad.double() * weight.double() * scale.double()
    near(grad_x, exact_x.grad, 2, largest=float(terms.abs().max()) if terms.numel() else 0.0)
    near(grad_weight, exact_weight.grad, 2)


def test_rms_norm_of_zeros_is_zero_and_has_a_finite_slope() -> None:
    x, weight = torch.zeros(2, 5), randn(5, seed=0, dtype=torch.float32)
    scale = inverse_rms(x, EPS)
    grad = torch.ones(2, 5)
    assert not normalize(x, scale, weight).any()
    grad_x, grad_weight = normalize_backward(grad, x, scale, weight)
    torch.testing.assert_close(grad_x, (weight / EPS**0.5).expand(2, 5))
    assert not grad_weight.any()


def test_rms_norm_rounds_before_the_weight_as_the_released_code_does() -> None:
    x, weight = randn(64, 48, seed=1, dtype=torch.bfloat16), randn(48, seed=2, dtype=torch.bfloat16)
    wide = x.float()
    normal = (wide * (wide.pow(2).mean(-1, keepdim=True) + EPS).rsqrt()).to(torch.bfloat16)
    made = normalize(x, inverse_rms(x, EPS), weight)
    differ = (made != weight * normal).float().mean()
    # The root is summed in another order: a few numbers round to the other side. Without the first
    # rounding a third of them would differ.
    assert float(differ) < 0.01
    assert float(((wide * inverse_rms(x, EPS) * weight).to(torch.bfloat16) != weight * normal).float().mean()) > 0.1


FP8_SHAPES = [(5, 1), (9, 100), (40, 130), (3, 1024)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", FP8_SHAPES)
def test_codes_are_those_of_the_formula_rounded_once(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x_AD, weight_D, _ = norm_inputs(shape, dtype)
    exact_AD = rms_norm(x_AD.double(), weight_D.double(), FP8_EPS)
    for power_of_two in (False, True):
        normal, inverse_A1 = rms_norm_quantize(strided(x_AD), weight_D, FP8_EPS, power_of_two=power_of_two)
        assert_codes_near(normal, quantize_1x128(exact_AD, power_of_two=power_of_two))
        near(inverse_A1, (x_AD.double().square().mean(1, keepdim=True) + FP8_EPS).rsqrt(), 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", FP8_SHAPES)
def test_backward_is_the_formula_at_the_codes_values(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x_AD, weight_D, grad_AD = norm_inputs(shape, dtype)
    normal, inverse_A1 = rms_norm_quantize(x_AD, weight_D, FP8_EPS, power_of_two=False)
    value_AD, wide_D = dequantize_1x128(normal, torch.float64), weight_D.double()
    hat_AD = torch.where(wide_D == 0, 0, value_AD / wide_D)
    slope_AD = grad_AD.double() * wide_D
    mean_A1 = (slope_AD * hat_AD).mean(1, keepdim=True)
    expected_AD = inverse_A1.double() * (slope_AD - hat_AD * mean_A1)
    grad_x_AD, grad_weight_D = rms_norm_backward_from_codes(strided(grad_AD), normal, inverse_A1, weight_D)
    assert (grad_x_AD.dtype, grad_weight_D.dtype) == (dtype, torch.float32)
    near(grad_x_AD, expected_AD, 1, largest=float((slope_AD * inverse_A1).abs().max()))
    near(grad_weight_D, (grad_AD.double() * hat_AD).sum(0), 4)


def test_rows_of_more_than_a_chunk_are_those_of_each_row() -> None:
    x_AD, weight_D, grad_AD = norm_inputs((CHUNK_NUMBERS // 7168 + 2, 7168), torch.bfloat16)
    normal, inverse_A1 = rms_norm_quantize(x_AD, weight_D, FP8_EPS, power_of_two=True)
    grad_x_AD, grad_weight_D = rms_norm_backward_from_codes(grad_AD, normal, inverse_A1, weight_D)
    total_D = torch.zeros(7168, dtype=torch.float64)
    for row in range(len(x_AD)):
        one = slice(row, row + 1)
        single, inverse_11 = rms_norm_quantize(x_AD[one], weight_D, FP8_EPS, power_of_two=True)
        assert_same_bits(normal.codes[one], single.codes)
        assert_same_bits(normal.scales[one], single.scales)
        assert_same_bits(inverse_A1[one], inverse_11)
        single_x_1D, single_D = rms_norm_backward_from_codes(grad_AD[one], single, inverse_11, weight_D)
        assert_same_bits(grad_x_AD[one], single_x_1D)
        total_D += single_D
    near(grad_weight_D, total_D, 4)


@pytest.mark.parametrize(("num_rows", "num_columns"), [(0, 128), (0, 1), (3, 0)])
def test_nothing_has_its_shapes(num_rows: int, num_columns: int) -> None:
    x_AD, weight_D = torch.ones(num_rows, num_columns), torch.ones(num_columns)
    normal, inverse_A1 = rms_norm_quantize(x_AD, weight_D, FP8_EPS, power_of_two=False)
    assert normal.codes.shape == (num_rows, num_columns)
    assert normal.scales.shape == (num_rows, -(-num_columns // 128))
    assert inverse_A1.shape == (num_rows, 1)
    grad_x_AD, grad_weight_D = rms_norm_backward_from_codes(x_AD, normal, inverse_A1, weight_D)
    assert grad_x_AD.shape == x_AD.shape
    assert grad_weight_D.tolist() == [0.0] * num_columns


def test_a_weight_of_zero_has_no_slope_and_gives_none() -> None:
    grad_AD, weight_D = torch.ones(2, 4), torch.tensor([1.0, 0.0, -0.0, 2.0])
    normal = quantize_1x128(torch.tensor([[1.0, 0.0, 0.0, 4.0]] * 2), power_of_two=False)
    grad_x_AD, grad_weight_D = rms_norm_backward_from_codes(grad_AD, normal, torch.ones(2, 1), weight_D)
    assert grad_weight_D[1:3].tolist() == [0.0, 0.0]
    assert grad_x_AD[:, 1:3].tolist() == [[0.0, 0.0]] * 2
    broken = Quantized(normal.codes, torch.full((2, 1), torch.nan))
    assert rms_norm_backward_from_codes(grad_AD, broken, torch.ones(2, 1), weight_D)[0].isnan().all()
