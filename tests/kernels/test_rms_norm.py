"""RMSNorm and its backward against the formula in float64."""

import pytest
import torch

from kernels.rms_norm.reference import inverse_rms, normalize, normalize_backward
from tests.kernels.plain import near, randn, rms_norm, strided

EPS = 1e-6
SHAPES = [(5, 7), (2, 3, 33), (1, 1), (0, 9), (1, 257), (130, 64)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


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
