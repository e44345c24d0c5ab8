"""The second half of a SwiGLU network in FP8: its input is kept in FP8, the gate is applied anew in the backward.

Source: arXiv:2412.19437, section 3.3.3. Shape legend: A rows, D hidden size, M intermediate size, H = 2 M.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.quantize.layout import Quantized
from kernels.swiglu import swiglu_backward_from_codes, swiglu_quantize
from model.precision.fp8.maps import Fp8Maps, give
from model.precision.linear import WeightSink


class _GatedDown(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, base: Tensor, hidden: Tensor, down_DM: Tensor, sink: WeightSink | None, maps: Fp8Maps
    ) -> Tensor:
        gated, kept = swiglu_quantize(hidden.flatten(0, -2), None, maps.power_of_two)
        ctx.save_for_backward(*kept, down_DM)
        ctx.sink, ctx.maps, ctx.shape = sink, maps, hidden.shape
        return maps.forward(gated, (down_DM,)).view_as(base).add_(base)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        codes, scales, down_DM = ctx.saved_tensors
        (grad,), maps = grads, ctx.maps
        grad_AD = grad.flatten(0, -2)
        grad_AM = maps.input_gradient(grad_AD, (down_DM,))
        grad_AH, gated_AM, _ = swiglu_backward_from_codes(grad_AM, Quantized(codes, scales), None)
        grad_down = give(down_DM, maps.weight_gradient(grad_AD, gated_AM), ctx.sink)
        return grad, grad_AH.view(ctx.shape), grad_down, None, None


def gated_down(base: Tensor, hidden: Tensor, down_DM: Tensor, sink: WeightSink | None, maps: Fp8Maps) -> Tensor:
    """base + (silu(gate) * up) down^T, [..., D].

    Args:
        base: [..., D].
        hidden: gate and up side by side, [..., H].
        down_DM: the weight.
        sink: takes its gradient.
        maps: of the model.
    """
    out: Tensor = _GatedDown.apply(base, hidden, down_DM, sink, maps)  # type: ignore[no-untyped-call]
    return out
