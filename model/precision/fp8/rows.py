"""Rows on their way to experts in FP8, quantized once for local and remote experts.

Autograd does not support codes. A placeholder without memory takes the gradient in their place, and rounding counts as
the identity (arXiv:2412.19437, section 3.3.3). Shape legend: N tokens, A received rows, B bytes of a packed row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kernels.quantize import quantize_1x128
from kernels.quantize.layout import GRADIENTS_MIN_AMAX, pack
from kernels.rms_norm import rms_norm
from model.norm import NormSource
from model.precision.linears import Rows


class GradientSlot:
    """Passes the gradient of the experts' output to their backward in FP8, outside autograd."""

    def __init__(self) -> None:
        self._packed_AB: Tensor | None = None

    def put(self, packed_AB: Tensor, num_columns: int, dtype: torch.dtype) -> Tensor:
        """Stores the packed gradient; returns the placeholder that autograd gets, AD."""
        self._packed_AB = packed_AB
        return placeholder((len(packed_AB), num_columns), packed_AB.new_empty((), dtype=dtype))

    def take(self) -> Tensor:
        """Returns the stored gradient and clears the slot."""
        packed_AB = self._packed_AB
        self._packed_AB = None
        assert packed_AB is not None, "experts: a backward without the gradient of the output in FP8"
        return packed_AB


@dataclass(frozen=True, slots=True)
class Fp8Rows:
    """Codes and power-of-two scales, uint8 NB or AB; `values` takes the gradient, `slot` the output's."""

    values: Tensor
    packed: Tensor
    slot: GradientSlot | None = None

    def with_values(self, values: Tensor) -> "Fp8Rows":
        """Returns the same codes with another tensor that takes the gradient."""
        return replace(self, values=values)


def as_fp8(rows: Rows) -> Fp8Rows:
    """Narrows the type of rows that `Fp8Linears` or its wire created."""
    assert isinstance(rows, Fp8Rows)
    return rows


class Fp8Wire:
    """Sends rows and their output gradients to experts in FP8; what returns has the model's type."""

    def __init__(self) -> None:
        self._slot = GradientSlot()

    def pack(self, rows: Rows) -> Tensor:
        """Returns the codes, NB."""
        return as_fp8(rows).packed

    def unpack(self, received: Tensor, sent: Rows) -> Fp8Rows:
        """Returns the received codes, AB, with a placeholder for their gradient, AD."""
        values_AD = placeholder((len(received), sent.values.shape[-1]), sent.values)
        return Fp8Rows(values_AD, received, self._slot)

    def pack_gradient(self, grad_ND: Tensor) -> Tensor:
        """Returns the gradient in codes, NB."""
        return pack_gradient(grad_ND)

    def unpack_gradient(self, received: Tensor, grad_ND: Tensor) -> Tensor:
        """Stores the codes in the slot; returns a placeholder, AD."""
        return self._slot.put(received, grad_ND.shape[-1], grad_ND.dtype)


def placeholder(shape: Sequence[int], like: Tensor) -> Tensor:
    """Returns a tensor that takes a gradient in place of codes; all elements are the same zero in memory."""
    return like.new_zeros(()).expand(*shape)


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, normal: Tensor) -> tuple[Tensor, Tensor]:
        packed_AB = _pack(normal.flatten(0, -2))
        ctx.mark_non_differentiable(packed_AB)
        return placeholder(normal.shape, normal), packed_AB

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def _pack(normal_AD: Tensor) -> Tensor:
    return pack(quantize_1x128(normal_AD, power_of_two=True))


def pack_rows(normal: Tensor) -> Fp8Rows:
    """Quantizes a norm's output, [..., D], to the experts' input in FP8."""
    return Fp8Rows(*_Pack.apply(normal))  # type: ignore[no-untyped-call]


def pack_gradient(grad_ND: Tensor) -> Tensor:
    """Quantizes a gradient on its way to experts with power-of-two scales, NB."""
    return pack(quantize_1x128(grad_ND.contiguous(), power_of_two=True, min_amax=GRADIENTS_MIN_AMAX))


def repack(source: NormSource) -> Tensor:
    """Recomputes the codes that `pack_rows` returned for the norm's output, AB."""
    return _pack(recompute_norm(source.x, source.norm_weight_D, source.eps))


def recompute_norm(x: Tensor, norm_weight_D: Tensor, eps: float) -> Tensor:
    """Recomputes the norm's output, AD, bit for bit."""
    normal_AD, _ = rms_norm(x.flatten(0, -2), norm_weight_D, eps)
    return normal_AD
