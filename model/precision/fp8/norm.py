"""A norm followed by linear layers, and linear layers of rows that are a norm's output, in FP8.

Both keep the layers' input in FP8 (arXiv:2412.19437, section 3.3.3), or the norm's input if that is kept anyway. The
norm is computed in float32; its backward reads the kept codes. Shape legend: A rows, B bytes of a row, N outputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.quantize.layout import Quantized, unpack
from kernels.rms_norm import rms_norm_backward_from_codes, rms_norm_quantize
from model.norm import NormSource, RmsNorm
from model.precision.fp8.maps import Fp8Maps, deliver_parts
from model.precision.fp8.rows import Fp8Rows, recompute_norm
from model.precision.linear import WeightSink


@dataclass(frozen=True, kw_only=True, slots=True)
class _NormOptions:
    eps: float
    sink: WeightSink | None
    maps: Fp8Maps


class _NormedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm_weight_D: Tensor, options: _NormOptions, *weights_ND: Tensor) -> Tensor:
        x_AD, maps = x.flatten(0, -2), options.maps
        operand, inverse_A1 = rms_norm_quantize(x_AD, norm_weight_D, options.eps, power_of_two=maps.power_of_two)
        out_AN = maps.forward(operand, weights_ND)
        ctx.save_for_backward(*operand, inverse_A1, norm_weight_D, *weights_ND)
        ctx.options = options
        return out_AN.view(*x.shape[:-1], out_AN.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        codes, scales, inverse_A1, norm_weight_D, *weights_ND = ctx.saved_tensors
        operand, grad_AN, maps = Quantized(codes, scales), grads[0].flatten(0, -2), ctx.options.maps
        grad_AD = maps.input_gradient(grad_AN, weights_ND)
        given = deliver_parts(weights_ND, maps.weight_gradient(grad_AN, operand), ctx.options.sink)
        grad_x_AD, grad_norm_D = rms_norm_backward_from_codes(grad_AD, operand, inverse_A1, norm_weight_D)
        grad_x = grad_x_AD.view(*grads[0].shape[:-1], grad_x_AD.shape[1])
        return grad_x, grad_norm_D.to(norm_weight_D.dtype), None, *given


def normed_linear(
    x: Tensor, norm: RmsNorm, weights_ND: Sequence[Tensor], sink: WeightSink | None, maps: Fp8Maps
) -> Tensor:
    """Returns linear layers of norm(x), [..., D], side by side; keeps only the codes of norm(x)."""
    options = _NormOptions(eps=norm.eps, sink=sink, maps=maps)
    out: Tensor = _NormedLinear.apply(x, norm.weight, options, *weights_ND)  # type: ignore[no-untyped-call]
    return out


class _LinearOfRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        packed_AB: Tensor,
        x: Tensor,
        norm_weight_D: Tensor,
        options: _NormOptions,
        *weights_ND: Tensor,
    ) -> Tensor:
        out_AN = options.maps.forward(unpack(packed_AB, x.shape[-1]), weights_ND)
        ctx.save_for_backward(x, norm_weight_D, *weights_ND)
        ctx.options = options
        return out_AN.view(*x.shape[:-1], out_AN.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, norm_weight_D, *weights_ND = ctx.saved_tensors
        options: _NormOptions = ctx.options
        maps, grad_AN = options.maps, grads[0].flatten(0, -2)
        normal_AD = recompute_norm(x, norm_weight_D, options.eps)
        gradient = maps.weight_gradient(grad_AN, normal_AD, power_of_two=True)
        given = deliver_parts(weights_ND, gradient, options.sink)
        return maps.input_gradient(grad_AN, weights_ND).view_as(x), None, None, None, None, *given


def linear_of_rows(
    rows: Fp8Rows, source: NormSource, weights_ND: Sequence[Tensor], sink: WeightSink | None, maps: Fp8Maps
) -> Tensor:
    """Returns linear layers of rows, [..., D], side by side; keeps the source of the rows."""
    options = _NormOptions(eps=source.eps, sink=sink, maps=maps)
    out: Tensor = _LinearOfRows.apply(  # type: ignore[no-untyped-call]
        rows.values, rows.packed, source.x.detach(), source.norm_weight_D.detach(), options, *weights_ND
    )
    return out
