"""Linear maps with a split backward, and the owners of their gradients until the optimizer's step.

The input gradient is computed at once, the weight gradient when the schedule says. Shape legend: A rows, K inputs, N
outputs.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from comm.protocol import Work
from kernels.operation import runs_as_on_cuda


class WeightSink(Protocol):
    """Takes closures that compute weight gradients later."""

    def defer(self, weight: Tensor, gradient: Callable[[], Tensor]) -> None:
        """Stores `gradient`, which computes the gradient of `weight` for one micro-batch when it is called."""


def deliver_gradient(weight: Tensor, gradient: Callable[[], Tensor], sink: WeightSink | None) -> Tensor | None:
    """Returns a weight's gradient in its type, or None if it is deferred to the sink or not required."""
    if not weight.requires_grad:
        return None
    if sink is None:
        return gradient().to(weight.dtype)
    sink.defer(weight, gradient)
    return None


@dataclass(frozen=True, slots=True)
class WeightProduct:
    """A weight's gradient as a product that can also be added to a sum, without memory for the product.

    `compute` adds to the sum that it is given, and returns the gradient if that is None.
    """

    compute: Callable[[Tensor | None], Tensor]

    def __call__(self) -> Tensor:
        """Returns the gradient."""
        return self.compute(None)


@dataclass(frozen=True, slots=True)
class CopiedProduct:
    """The gradient of copies of parts of a weight, which is added where the weight itself is.

    `send` sends it there, and returns sums by index of the weight's first axis.
    """

    product: WeightProduct
    shape: torch.Size
    send: Callable[[Tensor], Work[list[tuple[int, Tensor]]]]

    def __call__(self) -> Tensor:
        """Returns the gradient of the copies."""
        return self.product()

    def start(self, total: Tensor) -> Work[list[tuple[int, Tensor]]]:
        """Computes the gradient in the type of the weight's sum, and starts to send it."""
        gradient = total.new_zeros(self.shape)
        self.product.compute(gradient)
        return self.send(gradient)


def outer_product(grad_AN: Tensor, rows_AK: Tensor, total_NK: Tensor | None) -> Tensor:
    """Returns grad^T rows, NK, or adds it to a total in the total's type and returns that."""
    if total_NK is None:
        return grad_AN.t() @ rows_AK
    # One call accumulates in place if the types agree; else the product needs separate memory.
    if total_NK.dtype == grad_AN.dtype:
        return total_NK.addmm_(grad_AN.t(), rows_AK)
    if runs_as_on_cuda(total_NK.device) and total_NK.dtype == torch.float32:
        # A product of 16-bit types is added to a float32 sum before it is rounded.
        if total_NK.is_meta:  # torch before 2.13 cannot infer the shape of the product below
            return total_NK.addmm_(grad_AN.t(), rows_AK)
        return torch.addmm(total_NK, grad_AN.t(), rows_AK, out_dtype=torch.float32, out=total_NK)
    return total_NK.add_(grad_AN.t() @ rows_AK)


def deliver_product(
    weight_NK: Tensor, grad_AN: Tensor, rows: Callable[[], Tensor], sink: WeightSink | None
) -> Tensor | None:
    """Delivers the gradient of a linear map's weight; `rows` computes the map's input, AK."""
    return deliver_gradient(weight_NK, WeightProduct(lambda total: outer_product(grad_AN, rows(), total)), sink)


def deliver_products(
    weights_NK: Sequence[Tensor], grad_AN: Tensor, rows: Callable[[], Tensor], sink: WeightSink | None
) -> list[Tensor | None]:
    """Delivers the gradients of several maps of one input, given those of their joined outputs."""
    # The input stays until the last of the maps has read it.
    rows = rows if len(weights_NK) == 1 else cache(rows)
    grads_AN = grad_AN.split([len(weight_NK) for weight_NK in weights_NK], 1)
    return [deliver_product(weight_NK, part, rows, sink) for weight_NK, part in zip(weights_NK, grads_AN, strict=True)]


def deliver_parts(
    weights_NK: Sequence[Tensor], gradient: Callable[[], Tensor], sink: WeightSink | None
) -> list[Tensor | None]:
    """Delivers to each of several maps of one input its rows of a joint gradient, which is computed once."""
    if len(weights_NK) == 1:
        return [deliver_gradient(weights_NK[0], gradient, sink)]
    # The joint gradient stays until the last of its maps has taken its rows.
    joint = cache(gradient)
    gradients: list[Tensor | None] = []
    first = 0
    for weight_NK in weights_NK:
        rows = slice(first, first + len(weight_NK))
        gradients.append(deliver_gradient(weight_NK, partial(_rows_of, joint, rows), sink))
        first = rows.stop
    return gradients


def _rows_of(gradient: Callable[[], Tensor], rows: slice) -> Tensor:
    return gradient()[rows]


class _SplitLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_NK: Tensor, sink: WeightSink) -> Tensor:
        ctx.save_for_backward(x, weight_NK)
        ctx.sink = sink
        return functional.linear(x, weight_NK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        (grad,) = grads
        x, weight_NK = ctx.saved_tensors
        # The closure keeps only these two tensors until W: [A, N] and [A, K].
        grad_AN = grad.flatten(0, -2)
        x_AK = x.flatten(0, -2)
        deliver_product(weight_NK, grad_AN, lambda: x_AK, ctx.sink)
        return (grad @ weight_NK if ctx.needs_input_grad[0] else None), None, None


def linear(x: Tensor, weight_NK: Tensor, sink: WeightSink | None) -> Tensor:
    """Multiplies x, [..., K], by the transpose of the weight: [..., N].

    With a sink, the backward computes the input gradient and defers the weight gradient as a closure, once.
    """
    if sink is None or not torch.is_grad_enabled():
        return functional.linear(x, weight_NK)
    out: Tensor = _SplitLinear.apply(x, weight_NK, sink)  # type: ignore[no-untyped-call]
    return out


class Projection(nn.Module):
    """A weight without bias, [outputs, inputs]."""

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=dtype))

    def forward(self, x: Tensor, sink: WeightSink | None) -> Tensor:
        """Returns `linear` of x: [..., inputs] -> [..., outputs]."""
        return linear(x, self.weight, sink)


def join_storage(*maps: Projection) -> None:
    """Makes the weights of several maps parts of one matrix, which `join_weights` need not copy."""
    weights = [projection.weight for projection in maps]
    joint_NK = weights[0].new_empty(sum(map(len, weights)), weights[0].shape[1], requires_grad=False)
    for projection, part in zip(maps, joint_NK.split([len(weight) for weight in weights]), strict=True):
        projection.weight = nn.Parameter(part)


def join_weights(weights_NK: Sequence[Tensor]) -> Tensor:
    """Returns several maps as one: a view if they follow each other in memory, else a copy."""
    # Separate products of narrow matrices would read all rows several times.
    first = weights_NK[0]
    if len(weights_NK) == 1:
        return first
    storage = first.untyped_storage()._cdata
    end = first.storage_offset()
    for weight in weights_NK:
        if weight.untyped_storage()._cdata != storage or weight.storage_offset() != end or not weight.is_contiguous():
            return torch.cat(tuple(weights_NK))
        end += weight.numel()
    return first.as_strided((sum(map(len, weights_NK)), first.shape[1]), first.stride())


def widen(x: Tensor) -> Tensor:
    """Returns x in float32, or unchanged if it is wider: norms, router and losses compute in this type."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class WeightQueue:
    """Weight gradients of one phase of one micro-batch that wait for their W."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Tensor, Callable[[], Tensor]]] = deque()

    def defer(self, weight: Tensor, gradient: Callable[[], Tensor]) -> None:
        """Adds a closure that computes the gradient of `weight`."""
        self._waiting.append((weight, gradient))

    def flush(self, store: "GradientStore") -> None:
        """Computes all waiting gradients and adds them to the store; frees each one's tensors before the next."""
        # Oldest first, so that each closure's tensors are freed before the next product is allocated.
        with torch.no_grad():
            while self._waiting:
                weight, gradient = self._waiting.popleft()
                if isinstance(gradient, WeightProduct):
                    gradient.compute(store.open_sum(weight))
                elif isinstance(gradient, CopiedProduct):
                    store.add_later(weight, gradient.start(store.open_sum(weight)))
                else:
                    store.add(weight, gradient())


class GradientStore:
    """Sums of gradients over a step's micro-batches, at least float32 for any type of weights.

    A hook moves gradients that autograd accumulates (norms, router) here. All others arrive through `add`. Once a sum
    is complete, its owner seals it, and a gradient that arrives later raises RuntimeError.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        # Sums of many micro-batches in 16 bits would lose small gradients.
        self._sums = {
            parameter: torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))
            for parameter in parameters
        }
        self._sealed: set[int] = set()
        self._arriving: deque[tuple[Tensor, Work[list[tuple[int, Tensor]]]]] = deque()
        # The hook must not hold the store, and with it the parameter: torch never collects hooks, so neither would be
        # freed.
        for parameter, total in self._sums.items():
            parameter.register_post_accumulate_grad_hook(partial(_move, total, self._sealed))

    def add(self, parameter: Tensor, gradient: Tensor) -> None:
        """Adds one gradient of `parameter`, with the same shape."""
        self.open_sum(parameter).add_(gradient)

    def add_later(self, parameter: Tensor, parts: Work[list[tuple[int, Tensor]]]) -> None:
        """Adds gradients by index of the first axis when they have arrived, or the sum is sealed."""
        # Both weights of one layer's experts may be under way, so that memory is bounded.
        self._arriving.append((parameter, parts))
        self.receive(2)

    def receive(self, num_left: int = 0) -> None:
        """Adds gradients of `add_later`, in order, until few are left."""
        while len(self._arriving) > num_left:
            parameter, parts = self._arriving.popleft()
            total = self.open_sum(parameter)
            for index, gradient in parts.wait():
                total[index].add_(gradient)

    def open_sum(self, parameter: Tensor) -> Tensor:
        """Returns the sum of `parameter` to add to. Raises RuntimeError if it is sealed."""
        _check_unsealed(self._sealed, parameter)
        return self._sums[parameter]

    def gradient(self, parameter: Tensor) -> Tensor:
        """Returns the sum so far, zeros if nothing arrived. This is the store's own tensor, not a copy."""
        return self._sums[parameter]

    def gradients(self) -> list[Tensor]:
        """Returns all sums so far."""
        return list(self._sums.values())

    def seal(self, parameters: Iterable[Tensor]) -> None:
        """Takes the sums of some parameters for complete until they are cleared."""
        self.receive()
        self._sealed.update(map(id, parameters))

    def clear(self, parameters: Iterable[Tensor] | None = None) -> None:
        """Sets the sums of some parameters, by default of all, to zero."""
        for parameter in self._sums if parameters is None else parameters:
            self._sums[parameter].zero_()
            self._sealed.discard(id(parameter))


def _check_unsealed(sealed: set[int], parameter: Tensor) -> None:
    if id(parameter) in sealed:
        shape = "x".join(map(str, parameter.shape))
        raise RuntimeError(f"a gradient of a parameter of {shape} arrived after the reduction of its stage had started")


def _move(total: Tensor, sealed: set[int], parameter: Tensor) -> None:
    if parameter.grad is not None:
        _check_unsealed(sealed, parameter)
        # Without this, autograd would keep a second sum in the parameter's type.
        total.add_(parameter.grad)
        parameter.grad = None
