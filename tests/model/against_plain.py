"""A module's outputs and every gradient against a plain reading in float64, whichever way its weights get theirs."""

from collections.abc import Callable, Collection, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from model.linear import GradientStore, WeightQueue, WeightSink

Weights = Mapping[str, Tensor]
Call = Callable[[Any, Sequence[Tensor], WeightSink | None], Sequence[Tensor]]
Plain = Callable[[Weights, Sequence[Tensor]], Sequence[Tensor]]
TOLERANCES = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 0.04}
"""Tolerance for a whole tensor: bf16 rounds each number between two operations, by up to 2^-8."""


def randomize(module: nn.Module, seed: int, size: float = 0.4) -> None:
    """Fills a model with normal numbers of this size, around 1 in norms."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * size
            parameter.copy_(drawn + 1 if "norm" in name else drawn)


def assert_equals_plain(
    module: nn.Module,
    call: Call,
    plain: Plain,
    inputs: Sequence[Tensor],
    *,
    is_split: bool,
    frozen: Collection[str] = (),
) -> None:
    """Outputs, and gradients of inputs and weights, of one backward from random slopes of the outputs.

    Args:
        module: whose weights are used, in a copy; their type is that of the tolerance.
        plain: weights by name and inputs, in float64, to outputs, under ordinary autograd.
    """
    module = deepcopy(module)
    weights = dict(module.named_parameters())
    for name, weight in weights.items():
        weight.requires_grad_(name not in frozen)
    exact_weights = {name: _exact(weight) for name, weight in weights.items()}
    exact_inputs = [_exact(given) if given.is_floating_point() else given for given in inputs]
    ours = [given.detach().requires_grad_(given.is_floating_point()) for given in inputs]
    expected = plain(exact_weights, exact_inputs)
    generator = torch.Generator().manual_seed(77)
    slopes = [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(ours[0].dtype) for out in expected]
    torch.autograd.backward(list(expected), [slope.double() for slope in slopes])
    store = _store_of(weights, frozen) if is_split else None
    queue = WeightQueue()
    made = call(module, ours, queue if is_split else None)
    torch.autograd.backward(list(made), [slope.to(out.dtype) for slope, out in zip(slopes, made, strict=True)])
    if store is not None:
        queue.flush(store)
    tolerance = TOLERANCES[next(iter(weights.values())).dtype]
    for index, (out, exact) in enumerate(zip(made, expected, strict=True)):
        assert_near(out.detach(), exact.detach(), tolerance, f"output {index}")
    for index, (given, exact) in enumerate(zip(ours, exact_inputs, strict=True)):
        if given.requires_grad:
            assert given.grad is not None
            assert exact.grad is not None
            assert_near(given.grad, exact.grad, tolerance, f"gradient of input {index}")
    for name, weight in weights.items():
        exact_gradient = exact_weights[name].grad
        assert exact_gradient is not None, name
        if name in frozen:
            assert weight.grad is None, name
            continue
        gradient = weight.grad if store is None else store.gradient(weight)
        assert gradient is not None, name
        assert store is None or weight.grad is None, name
        assert_near(gradient, exact_gradient, tolerance, f"gradient of {name}")


def assert_near(made: Tensor, exact: Tensor, tolerance: float, what: str) -> None:
    """Asserts the same shape, and a difference whose norm is at most this share of the expected norm."""
    assert made.shape == exact.shape, what
    error, size = float((made.double() - exact).norm()), float(exact.norm())
    assert error <= tolerance * max(size, 0.01), f"{what}: {error} of {size}"


def _exact(tensor: Tensor) -> Tensor:
    return tensor.detach().double().clone().requires_grad_()


def _store_of(weights: Weights, frozen: Collection[str]) -> GradientStore:
    return GradientStore([weight for name, weight in weights.items() if name not in frozen])
