"""SwiGLU's gate and its backward against the formula in float64."""

import pytest
import torch

from kernels.swiglu.reference import swiglu, swiglu_backward
from tests.kernels import plain
from tests.kernels.plain import near, randn, strided


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
