"""A norm and the linear maps behind it, in FP8: what is kept of both is the maps' input in FP8.

Source: arXiv:2412.19437, section 3.3.3. The norm is computed in float32; its backward reads the kept codes. Shape
legend: A rows, D hidden size, N outputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.quantize import quantize_1x128
from kernels.quantize.layout import Quantized, pack, unpack
from kernels.rms_norm import rms_norm, rms_norm_backward_from_codes, rms_norm_quantize
from model.norm import RmsNorm
from model.precision.fp8.maps import Fp8Maps, give_parts
from model.precision.linear import WeightSink


@dataclass(frozen=True, kw_only=True, slots=True)
class _Options:
    """What is told beside tensors."""

    eps: float
    sink: WeightSink | None
    maps: Fp8Maps


class _NormedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm_weight_D: Tensor, options: _Options, *weights_ND: Tensor) -> Tensor:
        x_AD, maps = x.flatten(0, -2), options.maps
        operand, inverse_A1 = rms_norm_quantize(x_AD, norm_weight_D, options.eps, maps.power_of_two)
        out_AN = maps.forward(operand, weights_ND)
        ctx.save_for_backward(*operand, inverse_A1, norm_weight_D, *weights_ND)
        ctx.options = options
        return out_AN.view(*x.shape[:-1], out_AN.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        codes, scales, inverse_A1, norm_weight_D, *weights_ND = ctx.saved_tensors
        operand, grad_AN, maps = Quantized(codes, scales), grads[0].flatten(0, -2), ctx.options.maps
        grad_AD = maps.input_gradient(grad_AN, weights_ND)
        given = give_parts(weights_ND, maps.weight_gradient(grad_AN, operand), ctx.options.sink)
        grad_x_AD, grad_norm_D = rms_norm_backward_from_codes(grad_AD, operand, inverse_A1, norm_weight_D)
        grad_x = grad_x_AD.view(*grads[0].shape[:-1], grad_x_AD.shape[1])
        return grad_x, grad_norm_D.to(norm_weight_D.dtype), None, *given


def normed_linear(
    x: Tensor, norm: RmsNorm, weights_ND: Sequence[Tensor], sink: WeightSink | None, maps: Fp8Maps
) -> Tensor:
    """`model.norm.normed_linear` in FP8, which keeps neither x nor norm(x) but the latter's codes."""
    options = _Options(eps=norm.eps, sink=sink, maps=maps)
    out: Tensor = _NormedLinear.apply(x, norm.weight, options, *weights_ND)  # type: ignore[no-untyped-call]
    return out


def _normal(x: Tensor, norm_weight_D: Tensor, eps: float) -> Tensor:
    """norm(x) once more, AD: the bits that it had in the forward."""
    normal_AD, _ = rms_norm(x.flatten(0, -2), norm_weight_D, eps)
    return normal_AD


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, normal: Tensor, maps: Fp8Maps) -> tuple[Tensor, Tensor]:
        packed_AB = _pack(normal.flatten(0, -2), maps)
        ctx.mark_non_differentiable(packed_AB)
        return stand_in(normal.shape, normal), packed_AB

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def _pack(normal_AD: Tensor, maps: Fp8Maps) -> Tensor:
    return pack(quantize_1x128(normal_AD, True))


@dataclass(frozen=True, slots=True)
class Source:
    """What rows are the norm of, [..., D], and by which norm: enough to make them again."""

    x: Tensor
    norm_weight_D: Tensor
    eps: float

    def pack_again(self, maps: Fp8Maps) -> Tensor:
        """The packed rows that `pack_rows` gave of norm(x), AB."""
        return _pack(_normal(self.x, self.norm_weight_D, self.eps), maps)


def pack_rows(normal: Tensor, maps: Fp8Maps) -> tuple[Tensor, Tensor]:
    """Rows in FP8, put so once: the experts' input, near and far (arXiv:2412.19437, section 3.3.3).

    Args:
        normal: [..., D].
        maps: of the model.

    Returns:
        What takes the rows' gradient (rounding counts as the identity) and has no memory of its own, [..., D]; codes
        and power-of-two scales, uint8 AB.
    """
    return _Pack.apply(normal, maps)  # type: ignore[no-any-return, no-untyped-call]


def stand_in(shape: Sequence[int], like: Tensor) -> Tensor:
    """A tensor of a shape that takes a gradient in the place of codes; its numbers are zeros, and in one place."""
    return like.new_zeros(()).expand(*shape)


class _LinearOfRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        packed_AB: Tensor,
        x: Tensor,
        norm_weight_D: Tensor,
        options: _Options,
        *weights_ND: Tensor,
    ) -> Tensor:
        out_AN = options.maps.forward(unpack(packed_AB, x.shape[-1]), weights_ND)
        ctx.save_for_backward(x, norm_weight_D, *weights_ND)
        ctx.options = options
        return out_AN.view(*x.shape[:-1], out_AN.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, norm_weight_D, *weights_ND = ctx.saved_tensors
        options: _Options = ctx.options
        maps, grad_AN = options.maps, grads[0].flatten(0, -2)
        normal_AD = _normal(x, norm_weight_D, options.eps)
        gradient = maps.weight_gradient(grad_AN, normal_AD, power_of_two=True)
        given = give_parts(weights_ND, gradient, options.sink)
        return maps.input_gradient(grad_AN, weights_ND).view_as(x), None, None, None, None, *given


def linear_of_rows(
    rows: Tensor,
    packed_AB: Tensor,
    x: Tensor,
    norm: RmsNorm,
    weights_ND: Sequence[Tensor],
    sink: WeightSink | None,
    maps: Fp8Maps,
) -> Tensor:
    """Linear maps of rows that `pack_rows` made of norm(x); x is kept, from which the rows are made again.

    Args:
        rows: takes the gradient, [..., D].
        packed_AB: the rows.
        x: [..., D]; gets no gradient here, nor does the norm's weight.
        norm: by which the rows were made.
        weights_ND: of the maps.
        sink: takes their gradients.
        maps: of the model.
    """
    options = _Options(eps=norm.eps, sink=sink, maps=maps)
    out: Tensor = _LinearOfRows.apply(  # type: ignore[no-untyped-call]
        rows, packed_AB, x.detach(), norm.weight.detach(), options, *weights_ND
    )
    return out
