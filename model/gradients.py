"""Ownership of gradients between backward passes and the optimizer's step."""

from collections import deque
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor


class WeightQueue:
    """Weight gradients of one phase of one micro-batch that wait for their W."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Tensor, Callable[[], Tensor]]] = deque()

    def defer(self, weight: Tensor, gradient: Callable[[], Tensor]) -> None:
        """Adds a closure that computes the gradient of `weight`."""
        self._waiting.append((weight, gradient))

    def flush(self, store: "GradientStore") -> None:
        """Computes all waiting gradients and adds them to the store; frees each one's tensors before the next."""
        with torch.no_grad():
            while self._waiting:
                weight, gradient = self._waiting.popleft()
                store.add(weight, gradient())


class GradientStore:
    """Sums of gradients over a step's micro-batches, at least float32 for any type of weights.

    A hook moves gradients that autograd accumulates (norms, router) here. All others arrive through `add`.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._sums = {
            parameter: torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))
            for parameter in parameters
        }
        # The hook must not hold the store, and with it the parameter: torch never collects hooks, so neither would be
        # freed.
        for parameter, total in self._sums.items():
            parameter.register_post_accumulate_grad_hook(partial(_move, total))

    def add(self, parameter: Tensor, gradient: Tensor) -> None:
        """Adds one gradient of `parameter`, with the same shape."""
        self._sums[parameter].add_(gradient)

    def gradient(self, parameter: Tensor) -> Tensor:
        """Returns the sum so far, zeros if nothing arrived. This is the store's own tensor, not a copy."""
        return self._sums[parameter]

    def gradients(self) -> list[Tensor]:
        """Returns all sums so far."""
        return list(self._sums.values())

    def clear(self, parameters: Iterable[Tensor] | None = None) -> None:
        """Sets the sums of some parameters, by default of all, to zero."""
        for parameter in self._sums if parameters is None else parameters:
            self._sums[parameter].zero_()


def _move(total: Tensor, parameter: Tensor) -> None:
    if parameter.grad is not None:
        total.add_(parameter.grad)
        parameter.grad = None
