"""Rows on their way to experts in FP8: put in codes once, near and far (arXiv:2412.19437, section 3.3.3).

Autograd knows no codes. A placeholder without memory takes the gradient in their place; rounding counts as the
identity. Shape legend: N tokens, A received rows, B bytes of a packed row, D hidden size.
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
    """Brings the gradient of the experts' output to their backward in FP8, past autograd."""

    def __init__(self) -> None:
        self._packed_AB: Tensor | None = None

    def put(self, packed_AB: Tensor, num_columns: int, dtype: torch.dtype) -> Tensor:
        """Leaves the packed gradient here; returns what autograd is given in its place, AD."""
        self._packed_AB = packed_AB
        return placeholder((len(packed_AB), num_columns), packed_AB.new_empty((), dtype=dtype))

    def take(self) -> Tensor:
        """Returns what was left here, once."""
        packed_AB, self._packed_AB = self._packed_AB, None
        assert packed_AB is not None, "experts: a backward without the gradient of the output in FP8"
        return packed_AB


@dataclass(frozen=True, slots=True)
class Fp8Rows:
    """Rows in FP8 with power-of-two scales.

    values: takes the rows' gradient, [..., D]; has no memory. packed: codes and scales, uint8 NB or AB. slot: of
    received rows, brings the gradient of the experts' output.
    """

    values: Tensor
    packed: Tensor
    slot: GradientSlot | None = None

    def with_values(self, values: Tensor) -> "Fp8Rows":
        """Returns the same codes, whose gradient goes to another tensor."""
        return replace(self, values=values)


def as_fp8(rows: Rows) -> Fp8Rows:
    """Returns rows that `Fp8Linears` or its wire made, as what they are."""
    assert isinstance(rows, Fp8Rows)
    return rows


class Fp8Wire:
    """Sends rows to experts, and gradients after them, in FP8; results and gradients return in the model's type."""

    def __init__(self) -> None:
        self._slot = GradientSlot()

    def pack(self, rows: Rows) -> Tensor:
        """Returns the codes, NB."""
        return as_fp8(rows).packed

    def unpack(self, received: Tensor, sent: Rows) -> Fp8Rows:
        """Returns the codes that arrived, AB, with a placeholder for their gradient, AD."""
        values_AD = placeholder((len(received), sent.values.shape[-1]), sent.values)
        return Fp8Rows(values_AD, received, self._slot)

    def pack_gradient(self, grad_ND: Tensor) -> Tensor:
        """Returns the gradient in codes, NB."""
        return pack_gradient(grad_ND)

    def unpack_gradient(self, received: Tensor, grad_ND: Tensor) -> Tensor:
        """Puts the codes into the slot; returns a placeholder, AD."""
        return self._slot.put(received, grad_ND.shape[-1], grad_ND.dtype)


def placeholder(shape: Sequence[int], like: Tensor) -> Tensor:
    """Returns a tensor that takes a gradient in the place of codes; its numbers are zeros, all in one place."""
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
    return pack(quantize_1x128(normal_AD, True))


def pack_rows(normal: Tensor) -> Fp8Rows:
    """Returns the experts' input in FP8 from a norm's output, [..., D]."""
    return Fp8Rows(*_Pack.apply(normal))  # type: ignore[no-untyped-call]


def pack_gradient(grad_ND: Tensor) -> Tensor:
    """Returns a gradient on its way to experts in codes with power-of-two scales, NB."""
    return pack(quantize_1x128(grad_ND.contiguous(), True, GRADIENTS_MIN_AMAX))


def repack(source: NormSource) -> Tensor:
    """Returns the codes that `pack_rows` made of the norm's output, AB."""
    return _pack(recompute_norm(source.x, source.norm_weight_D, source.eps))


def recompute_norm(x: Tensor, norm_weight_D: Tensor, eps: float) -> Tensor:
    """Returns the norm's output, AD, with the bits that it had in the forward."""
    normal_AD, _ = rms_norm(x.flatten(0, -2), norm_weight_D, eps)
    return normal_AD
