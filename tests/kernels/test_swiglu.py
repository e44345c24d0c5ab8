"""SwiGLU's gate and its backward against the formula in float64, and between two FP8 products.

Shape legend: A rows, M intermediate size, H = 2 M.
"""

import pytest
import torch
from torch import Tensor

from kernels.quantize.layout import Quantized
from kernels.quantize.reference import CHUNK_NUMBERS, dequantize_1x128, quantize_1x128
from kernels.swiglu.reference import swiglu, swiglu_backward, swiglu_backward_from_codes, swiglu_quantize
from tests.kernels import plain
from tests.kernels.agreement import assert_same_bits
from tests.kernels.agreement_fused import assert_codes_near, hidden_and_grad
from tests.kernels.plain import near, randn, strided


@pytest.mark.covering(2)
@pytest.mark.parametrize("is_strided", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 7), (6, 33), (1, 1), (0, 9), (65, 64)])
def test_swiglu_and_gradients_equal_formula(shape: tuple[int, int], dtype: torch.dtype, is_strided: bool) -> None:
    gate, up, grad = (randn(*shape, seed=seed, dtype=dtype) * 3 for seed in range(3))
    exact_gate, exact_up = (each.double().clone().requires_grad_() for each in (gate, up))
    expected = plain.swiglu(exact_gate, exact_up)
    expected.backward(grad.double())
    hidden = torch.cat((gate, up), 1)
    if is_strided:
        hidden, grad = strided(hidden), strided(grad)
    before = hidden.clone(), grad.clone()
    made = swiglu(*hidden.chunk(2, 1))
    grad_hidden = swiglu_backward(grad, hidden)
    assert all(torch.equal(now, then) for now, then in zip((hidden, grad), before, strict=True))
    assert {made.dtype, grad_hidden.dtype} == {dtype}
    assert exact_gate.grad is not None
    assert exact_up.grad is not None
    near(made, expected.detach(), 3)
    near(grad_hidden, torch.cat((exact_gate.grad, exact_up.grad), 1), 3)


def test_swiglu_of_any_number_of_dims_is_that_of_its_rows() -> None:
    gate, up = randn(2, 3, 5, seed=0), randn(2, 3, 5, seed=1)
    assert torch.equal(swiglu(gate, up).flatten(0, 1), swiglu(gate.flatten(0, 1), up.flatten(0, 1)))


def test_swiglu_is_finite_far_out() -> None:
    gate = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4]])
    made = swiglu(gate, torch.ones(1, 5))
    grad_gate, grad_up = swiglu_backward(torch.ones(1, 5), torch.cat((gate, torch.ones(1, 5)), 1)).chunk(2, 1)
    torch.testing.assert_close(made, torch.tensor([[0.0, 0.0, 0.0, 100.0, 1e4]]))
    torch.testing.assert_close(grad_gate, torch.tensor([[0.0, 0.0, 0.5, 1.0, 1.0]]))
    assert torch.equal(grad_up, made)


SHAPES = [(1, 1), (9, 100), (12, 256), (3, 600)]


def some_weights(num_rows: int, dtype: torch.dtype | None) -> Tensor | None:
    return None if dtype is None else randn(num_rows, seed=2).abs().to(dtype)


@pytest.mark.covering(2)
@pytest.mark.parametrize("weights_dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_operand_is_the_formula_rounded_once_and_hidden_values_are_quantized(
    shape: tuple[int, int], dtype: torch.dtype, weights_dtype: torch.dtype | None
) -> None:
    hidden_AH, _ = hidden_and_grad(shape, dtype)
    weights_A = some_weights(shape[0], weights_dtype)
    factors_A1 = 1.0 if weights_A is None else weights_A.double()[:, None]
    exact_AM = plain.swiglu(*hidden_AH.double().chunk(2, 1)) * factors_A1
    for power_of_two in (False, True):
        gated, cached = swiglu_quantize(strided(hidden_AH), weights_A, power_of_two=power_of_two)
        assert_codes_near(gated, quantize_1x128(exact_AM, power_of_two=power_of_two))
        expected = quantize_1x128(hidden_AH, power_of_two=power_of_two)
        assert_same_bits(cached.codes, expected.codes)
        assert_same_bits(cached.scales, expected.scales)


@pytest.mark.covering(2)
@pytest.mark.parametrize("weights_dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_backward_is_the_slope_at_the_cached_values(
    shape: tuple[int, int], dtype: torch.dtype, weights_dtype: torch.dtype | None
) -> None:
    hidden_AH, grad_AM = hidden_and_grad(shape, dtype)
    weights_A = some_weights(shape[0], weights_dtype)
    cached = quantize_1x128(hidden_AH, power_of_two=False)
    exact_AH = dequantize_1x128(cached, torch.float32).double().requires_grad_()
    exact_A = None if weights_A is None else weights_A.double().requires_grad_()
    exact_AM = plain.swiglu(*exact_AH.chunk(2, 1)) * (1.0 if exact_A is None else exact_A[:, None])
    exact_AM.backward(grad_AM.double())
    grad_hidden_AH, gated_AM, grad_weights_A = swiglu_backward_from_codes(strided(grad_AM), cached, weights_A)
    assert grad_hidden_AH.dtype == gated_AM.dtype == dtype
    assert exact_AH.grad is not None
    near(grad_hidden_AH, exact_AH.grad, 1)
    near(gated_AM, exact_AM.detach(), 1)
    if exact_A is None:
        assert grad_weights_A is None
    else:
        assert exact_A.grad is not None
        assert grad_weights_A is not None
        assert grad_weights_A.dtype == torch.float32
        near(grad_weights_A, exact_A.grad, 2)


def test_rows_of_more_than_a_chunk_are_those_of_each_row() -> None:
    width = 3000
    hidden_AH, grad_AM = hidden_and_grad((CHUNK_NUMBERS // (2 * width) + 2, width), torch.bfloat16)
    weights_A = some_weights(len(hidden_AH), torch.float32)
    assert weights_A is not None
    gated, cached = swiglu_quantize(hidden_AH, weights_A, power_of_two=True)
    made = swiglu_backward_from_codes(grad_AM, cached, weights_A)
    for row in (0, len(hidden_AH) - 1):
        one = slice(row, row + 1)
        for whole, single in zip(
            (gated, cached), swiglu_quantize(hidden_AH[one], weights_A[one], power_of_two=True), strict=True
        ):
            assert_same_bits(whole.codes[one], single.codes)
            assert_same_bits(whole.scales[one], single.scales)
        part = Quantized(cached.codes[one], cached.scales[one])
        for all_rows, single_row in zip(
            made, swiglu_backward_from_codes(grad_AM[one], part, weights_A[one]), strict=True
        ):
            assert all_rows is not None
            assert single_row is not None
            assert_same_bits(all_rows[one], single_row)


@pytest.mark.parametrize(("num_rows", "width"), [(0, 128), (3, 0)])
def test_nothing_has_its_shapes(num_rows: int, width: int) -> None:
    gated, cached = swiglu_quantize(torch.ones(num_rows, 2 * width), torch.ones(num_rows), power_of_two=False)
    assert gated.codes.shape == (num_rows, width)
    assert gated.scales.shape == (num_rows, -(-width // 128))
    assert cached.codes.shape == (num_rows, 2 * width)
    assert cached.scales.shape == (num_rows, -(-2 * width // 128))
    made = swiglu_backward_from_codes(torch.ones(num_rows, width), cached, torch.ones(num_rows))
    assert [each.shape for each in made if each is not None] == [(num_rows, 2 * width), (num_rows, width), (num_rows,)]
    assert made[2] is not None
    assert not made[2].any()
