"""Root-mean-square normalisation, by itself and before linear maps.

Shape legend: A rows, D hidden size, N outputs of a linear map.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from kernels.rms_norm.reference import inverse_rms, normalise, normalise_backward
from model.linear import WeightSink, give


class RmsNorm(nn.Module):
    """x / rms(x) * weight over the last dim; normalised in float32, cast back, then scaled (as the released code)."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and type as x. For a backward only x is kept."""
        (normal,) = normed_linears(x, self, (), None, keeps_normal=False, gives_normal=True)
        return normal


@dataclass(frozen=True, kw_only=True, slots=True)
class _Options:
    """What `normed_linears` is told beside its tensors."""

    eps: float
    sink: WeightSink | None
    keeps_normal: bool
    gives_normal: bool
    is_wide: bool


class _NormedLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight_D: Tensor,
        options: _Options,
        *weights_ND: Tensor,
    ) -> tuple[Tensor, ...]:
        x_AD = x.flatten(0, -2)
        scale_A1 = inverse_rms(x_AD, options.eps)
        normal_AD = normalise(x_AD, scale_A1, norm_weight_D)
        outs = [_product(normal_AD, weight, options.is_wide) for weight in weights_ND]
        kept = (normal_AD,) if options.keeps_normal else ()
        ctx.save_for_backward(x_AD, scale_A1, norm_weight_D, *weights_ND, *kept)
        ctx.options, ctx.shape, ctx.num_weights = options, x.shape, len(weights_ND)
        if options.gives_normal:
            outs.insert(0, normal_AD)
        return tuple(out.view(*x.shape[:-1], out.shape[-1]) for out in outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x_AD, scale_A1, norm_weight_D, *rest = ctx.saved_tensors
        options: _Options = ctx.options
        weights, kept = rest[: ctx.num_weights], rest[ctx.num_weights :]
        normal = cache(lambda: kept[0] if kept else normalise(x_AD, scale_A1, norm_weight_D))
        flat = [None if grad is None else grad.flatten(0, -2) for grad in grads]
        grad_AD = flat.pop(0) if options.gives_normal else None
        grad_weights: list[Tensor | None] = []
        for grad_AN, weight_ND in zip(flat, weights, strict=True):
            if grad_AN is None:
                grad_weights.append(None)
                continue
            part_AD = grad_AN @ weight_ND.to(grad_AN.dtype)
            grad_AD = part_AD if grad_AD is None else part_AD.add_(grad_AD)
            grad_weights.append(give(weight_ND, _weight_gradient(grad_AN, normal, weight_ND.dtype), options.sink))
        assert grad_AD is not None
        grad_x_AD, grad_norm_D = normalise_backward(grad_AD, x_AD, scale_A1, norm_weight_D)
        return grad_x_AD.view(ctx.shape), grad_norm_D, None, *grad_weights


def _product(normal_AD: Tensor, weight_ND: Tensor, is_wide: bool) -> Tensor:
    if is_wide:
        wide = torch.promote_types(weight_ND.dtype, torch.float32)
        return normal_AD.to(wide) @ weight_ND.to(wide).t()
    return normal_AD @ weight_ND.t()


def _weight_gradient(grad_AN: Tensor, normal: Callable[[], Tensor], dtype: torch.dtype) -> Callable[[], Tensor]:
    return lambda: (grad_AN.t() @ normal().to(grad_AN.dtype)).to(dtype)


def normed_linears(
    x: Tensor,
    norm: RmsNorm,
    weights_ND: Sequence[Tensor],
    sink: WeightSink | None,
    *,
    keeps_normal: bool,
    gives_normal: bool = False,
    is_wide: bool = False,
) -> tuple[Tensor, ...]:
    """Linear maps of norm(x), without keeping norm(x) for the backward: it is computed anew from x.

    Args:
        x: [..., D].
        norm: applied first.
        weights_ND: of the maps.
        sink: takes the maps' weight gradients, as in `model.linear.linear`; the norm's comes through autograd.
        keeps_normal: keep norm(x) after all.
        gives_normal: return norm(x) itself too, before the maps' outputs.
        is_wide: maps and their outputs in float32 or wider.

    Returns:
        [..., N] of each map.
    """
    options = _Options(eps=norm.eps, sink=sink, keeps_normal=keeps_normal, gives_normal=gives_normal, is_wide=is_wide)
    outs: tuple[Tensor, ...] = _NormedLinears.apply(x, norm.weight, options, *weights_ND)  # type: ignore[no-untyped-call]
    return outs
