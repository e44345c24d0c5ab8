"""The SwiGLU feed-forward network of dense layers and of shared experts.

Shape legend: A rows, D hidden size, M intermediate size, H = 2 M gate and up side by side.
"""

from typing import Any

import torch
from torch import Tensor, nn

import kernels.swiglu.reference
from kernels.swiglu import swiglu, swiglu_backward
from model.config import Computing
from model.norm import RmsNorm, linear_of_normal, normed_linear
from model.precision.fp8 import norm as fp8_norm
from model.precision.fp8.maps import Fp8Maps
from model.precision.fp8.mlp import gated_down
from model.precision.linear import Projection, WeightSink, give, linear


class _GatedDown(torch.autograd.Function):
    """base + (silu(gate) * up) down^T, the product in brackets computed anew in the backward."""

    @staticmethod
    def forward(
        ctx: Any, base: Tensor, hidden: Tensor, down_DM: Tensor, sink: WeightSink | None, keeps: bool
    ) -> Tensor:
        hidden_AH = hidden.flatten(0, -2)
        gated_AM = swiglu(*hidden_AH.chunk(2, 1))
        ctx.save_for_backward(hidden_AH, down_DM, *((gated_AM,) if keeps else ()))
        ctx.sink, ctx.shape = sink, hidden.shape
        return torch.addmm(base.flatten(0, -2), gated_AM, down_DM.t()).view_as(base)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        hidden_AH, down_DM, *kept = ctx.saved_tensors
        grad_AD = grad.flatten(0, -2)

        def gradient() -> Tensor:
            return grad_AD.t() @ (kept[0] if kept else swiglu(*hidden_AH.chunk(2, 1)))

        grad_down = give(down_DM, gradient, ctx.sink)
        grad_hidden_AH = swiglu_backward(grad_AD @ down_DM, hidden_AH)
        return grad, grad_hidden_AH.view(ctx.shape), grad_down, None, None


class Mlp(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(
        self, hidden: int, intermediate: int, dtype: torch.dtype, computing: Computing, maps: Fp8Maps | None = None
    ) -> None:
        super().__init__()
        self._computing = computing
        self._maps = maps
        self.gate_proj = Projection(hidden, intermediate, dtype)
        self.up_proj = Projection(hidden, intermediate, dtype)
        self.down_proj = Projection(intermediate, hidden, dtype)

    def forward(self, x: Tensor, sink: WeightSink | None) -> Tensor:
        """[..., D] -> [..., D]."""
        gated = kernels.swiglu.reference.swiglu(self.gate_proj(x, sink), self.up_proj(x, sink))
        return linear(gated, self.down_proj.weight, sink)

    def add(self, x: Tensor, norm: RmsNorm, sink: WeightSink | None) -> Tensor:
        """x plus the network of norm(x), keeping x alone of the two: [..., D] -> [..., D]."""
        if self._maps is not None:
            return self._down(x, fp8_norm.normed_linear(x, norm, self._gate_up(), sink, self._maps), sink)
        keeps_normal = "norm" not in self._computing.recomputed
        return self._down(x, normed_linear(x, norm, self._gate_up(), sink, keeps_normal=keeps_normal), sink)

    def add_to(
        self, x: Tensor, normal: Tensor, norm: RmsNorm, sink: WeightSink | None, packed: Tensor | None = None
    ) -> Tensor:
        """`add` where norm(x) is at hand, which takes the gradient; it is computed anew from x in the backward.

        packed: norm(x) in FP8, where `normal` only stands in for it.
        """
        if self._maps is not None:
            assert packed is not None
            hidden = fp8_norm.linear_of_rows(normal, packed, x, norm, self._gate_up(), sink, self._maps)
        else:
            keeps_normal = "norm" not in self._computing.recomputed
            hidden = linear_of_normal(normal, x, norm, self._gate_up(), sink, keeps_normal=keeps_normal)
        return self._down(x, hidden, sink)

    def _gate_up(self) -> tuple[Tensor, Tensor]:
        return self.gate_proj.weight, self.up_proj.weight

    def _down(self, x: Tensor, hidden: Tensor, sink: WeightSink | None) -> Tensor:
        if self._maps is not None:
            return gated_down(x, hidden, self.down_proj.weight, sink, self._maps)
        keeps = "swiglu" not in self._computing.recomputed
        out: Tensor = _GatedDown.apply(x, hidden, self.down_proj.weight, sink, keeps)  # type: ignore[no-untyped-call]
        return out
