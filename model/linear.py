"""Linear maps whose backward can be split: input gradient now, weight gradient when the schedule says.

Shape legend: A rows, K inputs, N outputs, E experts.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from kernels.grouped_gemm.reference import grouped_rows, grouped_weight


class WeightSink(Protocol):
    """Takes weight gradients that are still to be computed."""

    def defer(self, weight: Tensor, gradient: Callable[[], Tensor]) -> None:
        """Keeps `gradient`, which computes the gradient of `weight` for one micro-batch when called."""
        ...


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
        grad_AN, x_AK = grad.flatten(0, -2), x.flatten(0, -2)
        ctx.sink.defer(weight_NK, lambda: grad_AN.t() @ x_AK)
        return (grad @ weight_NK if ctx.needs_input_grad[0] else None), None, None


class _SplitGroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_AK: Tensor, weight_ENK: Tensor, counts: Sequence[int], sink: WeightSink | None) -> Tensor:
        ctx.save_for_backward(x_AK, weight_ENK)
        ctx.counts, ctx.sink = counts, sink
        return grouped_rows(x_AK, weight_ENK, counts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_AN = grads[0].contiguous()
        x_AK, weight_ENK = ctx.saved_tensors
        counts, sink = ctx.counts, ctx.sink
        grad_AK = grouped_rows(grad_AN, weight_ENK.transpose(1, 2), counts)
        if sink is None:
            return grad_AK, grouped_weight(grad_AN, x_AK, counts), None, None
        sink.defer(weight_ENK, lambda: grouped_weight(grad_AN, x_AK, counts))
        return grad_AK, None, None, None


def linear(x: Tensor, weight_NK: Tensor, sink: WeightSink | None) -> Tensor:
    """x [..., K] times the transpose of the weight: [..., N].

    With a sink, autograd's backward gives the input gradient and hands the weight gradient to the sink
    as a closure, once; without one it is torch's own linear.
    """
    if sink is None or not torch.is_grad_enabled():
        return functional.linear(x, weight_NK)
    out: Tensor = _SplitLinear.apply(x, weight_NK, sink)  # type: ignore[no-untyped-call]
    return out


def grouped_linear(x_AK: Tensor, weight_ENK: Tensor, counts: Sequence[int], sink: WeightSink | None) -> Tensor:
    """Rows sorted by expert, each times the transpose of its expert's matrix: AN. Sink as in `linear`."""
    out: Tensor = _SplitGroupedLinear.apply(x_AK, weight_ENK, counts, sink)  # type: ignore[no-untyped-call]
    return out
