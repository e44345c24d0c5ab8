"""Who owns gradients between backward passes and the optimizer's step."""

from collections import deque
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor


class WeightQueue:
    """Weight gradients of one phase of one micro-batch, waiting for their W."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Tensor, Callable[[], Tensor]]] = deque()

    def defer(self, weight: Tensor, gradient: Callable[[], Tensor]) -> None:
        """Keeps a closure that computes the gradient of `weight`."""
        self._waiting.append((weight, gradient))

    def flush(self, store: "GradientStore") -> None:
        """Computes all that waits and adds it to the store; what each held goes before the next is computed."""
        with torch.no_grad():
            while self._waiting:
                weight, gradient = self._waiting.popleft()
                store.add(weight, gradient())


class GradientStore:
    """Sums of gradients over a step's micro-batches, at least float32 whatever the weights' type.

    Gradients that autograd itself accumulates (norms, router) are moved here by a hook as soon as they
    are made; those of linear maps and of the embedding arrive through `add`.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._sums = {
            parameter: torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))
            for parameter in parameters
        }
        # A hook that held the store, and so the parameter, would keep both for ever: torch's hooks are not collected.
        for parameter, total in self._sums.items():
            parameter.register_post_accumulate_grad_hook(partial(_move, total))

    def add(self, parameter: Tensor, gradient: Tensor) -> None:
        """Adds one gradient of `parameter`, same shape."""
        self._sums[parameter].add_(gradient)

    def gradient(self, parameter: Tensor) -> Tensor:
        """The sum so far; zeros where nothing arrived. The store's own tensor, not a copy."""
        return self._sums[parameter]

    def gradients(self) -> list[Tensor]:
        """All sums so far."""
        return list(self._sums.values())

    def clear(self) -> None:
        """Back to zero."""
        for total in self._sums.values():
            total.zero_()


def _move(total: Tensor, parameter: Tensor) -> None:
    if parameter.grad is not None:
        total.add_(parameter.grad)
        parameter.grad = None
