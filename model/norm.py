"""Root-mean-square normalization, alone and before linear maps.

Shape legend: A rows, N outputs of a linear map.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.operation import runs_as_on_cuda
from kernels.rms_norm import normalize, normalize_backward, rms_norm
from model.linear import WeightSink, deliver_products, join_weights


class RmsNorm(nn.Module):
    """Computes x / rms(x) * weight: in float32, cast, then scaled, as in the released code."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Returns a tensor with the shape and type of x. Only x is kept for a backward."""
        options = _Options(eps=self.eps, sink=None, keeps_normal=False, gives_normal=True, is_wide=False)
        (normal,) = _NormedLinear.apply(x, self.weight, options)  # type: ignore[no-untyped-call]
        return normal  # type: ignore[no-any-return]

    def decode(self, x: Tensor) -> Tensor:
        """Returns `forward` of x without gradients; torch's fused norm is rounded alike unless x is narrow."""
        weight = self.weight
        if x.device.type == "cpu" and x.dtype == weight.dtype and x.dtype in (torch.float32, torch.float64):
            return functional.rms_norm(x, weight.shape, weight, self.eps)
        return rms_norm(x, weight, self.eps)[0]


@dataclass(frozen=True, slots=True)
class NormSource:
    """Input of a norm and its weight: enough to recompute its output in a backward."""

    x: Tensor
    norm_weight_D: Tensor
    eps: float

    @classmethod
    def of(cls, x: Tensor, norm: RmsNorm) -> Self:
        """Returns the source for a norm and its input, [..., D]."""
        return cls(x, norm.weight, norm.eps)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Options:
    eps: float
    sink: WeightSink | None
    keeps_normal: bool
    gives_normal: bool
    is_wide: bool

    def type_of(self, weight_ND: Tensor) -> torch.dtype:
        return torch.promote_types(weight_ND.dtype, torch.float32) if self.is_wide else weight_ND.dtype


class _NormedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm_weight_D: Tensor, options: _Options, *weights_ND: Tensor
    ) -> tuple[Tensor, ...]:
        # The norm, and its inverse RMS for the backward: [A, D] and [A, 1].
        x_AD = x.flatten(0, -2)
        normal_AD, scale_A1 = rms_norm(x_AD, norm_weight_D, options.eps)
        saved_normal = (normal_AD,) if options.keeps_normal else ()
        ctx.save_for_backward(x_AD, scale_A1, norm_weight_D, *weights_ND, *saved_normal)
        ctx.options = options
        ctx.shape = x.shape
        ctx.num_weights = len(weights_ND)
        # All maps of the norm as one product: [A, N].
        outs = [normal_AD.view_as(x)] if options.gives_normal else []
        if weights_ND:
            out_AN = _product(normal_AD, join_weights(weights_ND), options.type_of(weights_ND[0]))
            outs.append(out_AN.view(*x.shape[:-1], out_AN.shape[1]))
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_AD, scale_A1, norm_weight_D, *rest = ctx.saved_tensors
        options: _Options = ctx.options
        weights_ND = rest[: ctx.num_weights]
        saved_normal = rest[ctx.num_weights :]
        # One gradient for each output: of the norm if it was returned (AD), of the maps (AN).
        grads_AX = [grad.flatten(0, -2) for grad in grads]
        grad_AD = grads_AX[0]
        grad_weights = list[Tensor | None]()
        if weights_ND:
            grad_AN = grads_AX[-1]
            # Both ways into the norm's output are summed, then the norm's own backward follows.
            part_AD = grad_AN @ join_weights(weights_ND).to(grad_AN.dtype)
            grad_AD = part_AD.add_(grad_AD) if options.gives_normal else part_AD
            # The weight gradient waits for W, and recomputes the norm there unless it was kept.

            def rows() -> Tensor:
                if saved_normal:
                    return saved_normal[0].to(grad_AN.dtype)  # type: ignore[no-any-return]
                return normalize(x_AD, norm_weight_D, options.eps, lambda: scale_A1).to(grad_AN.dtype)

            grad_weights = deliver_products(weights_ND, grad_AN, rows, options.sink)
        grad_x_AD, grad_norm_D = normalize_backward(grad_AD, x_AD, scale_A1, norm_weight_D)
        return grad_x_AD.view(ctx.shape), grad_norm_D, None, *grad_weights


class _LinearOfNormal(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, normal: Tensor, x: Tensor, norm_weight_D: Tensor, options: _Options, *weights_ND: Tensor
    ) -> Tensor:
        # The norm keeps its input anyway, so the output is computed again unless it is kept too.
        normal_AD = normal.flatten(0, -2)
        ctx.save_for_backward(normal_AD if options.keeps_normal else x.flatten(0, -2), norm_weight_D, *weights_ND)
        ctx.options = options
        ctx.shape = normal.shape
        out_AN = normal_AD @ join_weights(weights_ND).to(normal.dtype).t()
        return out_AN.view(*normal.shape[:-1], out_AN.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kept_AD, norm_weight_D, *weights_ND = ctx.saved_tensors
        options = ctx.options
        grad_AN = grads[0].flatten(0, -2)

        def rows() -> Tensor:
            if options.keeps_normal:
                return kept_AD  # type: ignore[no-any-return]
            return rms_norm(kept_AD, norm_weight_D, options.eps)[0]

        grad_weights = deliver_products(weights_ND, grad_AN, rows, options.sink)
        # The gradient of the norm's output; the norm's own backward belongs to the caller.
        grad = (grad_AN @ join_weights(weights_ND).to(grad_AN.dtype)).view(ctx.shape)
        return grad, None, None, None, *grad_weights


def _product(rows_AD: Tensor, weight_ND: Tensor, dtype: torch.dtype) -> Tensor:
    if rows_AD.dtype == weight_ND.dtype != dtype and runs_as_on_cuda(rows_AD.device):
        # Products of 16-bit numbers are exact in float32, so nothing is rounded, and no wider copy is read.
        return torch.mm(rows_AD, weight_ND.t(), out_dtype=dtype)
    return rows_AD.to(dtype) @ weight_ND.t().to(dtype)


def normed_linear(
    x: Tensor, norm: RmsNorm, weights_ND: Sequence[Tensor], sink: WeightSink | None, *, keeps_normal: bool
) -> Tensor:
    """Returns linear maps of norm(x), [..., D], side by side; a backward may recompute norm(x)."""
    options = _Options(eps=norm.eps, sink=sink, keeps_normal=keeps_normal, gives_normal=False, is_wide=False)
    (out,) = _NormedLinear.apply(x, norm.weight, options, *weights_ND)  # type: ignore[no-untyped-call]
    return out  # type: ignore[no-any-return]


def linear_of_normal(
    normal: Tensor, source: NormSource, weights_ND: Sequence[Tensor], sink: WeightSink | None, *, keeps_normal: bool
) -> Tensor:
    """Returns linear layers of a norm's output side by side; the norm may be recomputed from its input."""
    options = _Options(eps=source.eps, sink=sink, keeps_normal=keeps_normal, gives_normal=False, is_wide=False)
    out: Tensor = _LinearOfNormal.apply(  # type: ignore[no-untyped-call]
        normal, source.x, source.norm_weight_D, options, *weights_ND
    )
    return out


def norm_and_map(x: Tensor, norm: RmsNorm, weight_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Returns norm(x) and, in float32 or wider, its product with the weight, [..., N]; keeps only x."""
    options = _Options(eps=norm.eps, sink=None, keeps_normal=False, gives_normal=True, is_wide=True)
    normal, out = _NormedLinear.apply(x, norm.weight, options, weight_ND)  # type: ignore[no-untyped-call]
    return normal, out
