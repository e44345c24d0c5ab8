"""SwiGLU networks and routed experts in FP8 (arXiv:2412.19437, sections 3.3 and 3.3.3).

A network keeps its hidden values in FP8 and applies the gate again in the backward. Rows that were received in FP8 are
used as operands without conversion. Shape legend: N tokens, A rows in the experts' order, B bytes of a packed row, E
local experts, H = 2 M.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from comm.protocol import RowOrder
from kernels.grouped_gemm import grouped_rows_fp8, grouped_weight_fp8
from kernels.quantize import quantize_columns, requantize_columns
from kernels.quantize.layout import GRADIENTS_MIN_AMAX, Quantized, unpack
from kernels.swiglu import swiglu_backward_from_codes, swiglu_quantize
from model.linear import WeightSink, deliver_gradient
from model.norm import NormSource
from model.precision.fp8.rows import Fp8Maps, GradientSlot, pack_gradient, placeholder, repack


class GatedDown(torch.autograd.Function):
    """Computes base + (silu(gate) * up) down^T, [..., D], from gate and up side by side, [..., H]."""

    @staticmethod
    def forward(
        ctx: Any,
        base: Tensor,
        hidden: Tensor,
        down_DM: Tensor,
        sink: WeightSink | None,
        maps: Fp8Maps,
        for_backward: bool,  # noqa: FBT001
    ) -> Tensor:
        """Keeps gate and up in FP8. `for_backward`: only the backward is needed; the result has no numbers."""
        gated, kept = swiglu_quantize(hidden.flatten(0, -2), None, power_of_two=maps.power_of_two)
        ctx.save_for_backward(*kept, down_DM)
        ctx.sink = sink
        ctx.maps = maps
        ctx.shape = hidden.shape
        if for_backward:
            return placeholder(base.shape, base)
        return maps.forward(gated, (down_DM,)).view_as(base).add_(base)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Applies the gate again."""
        codes, scales, down_DM = ctx.saved_tensors
        (grad,) = grads
        maps = ctx.maps
        grad_AD = grad.flatten(0, -2)
        grad_AM = maps.input_gradient(grad_AD, (down_DM,))
        grad_AH, gated_AM, _ = swiglu_backward_from_codes(grad_AM, Quantized(codes, scales), None)
        grad_down = deliver_gradient(down_DM, maps.weight_gradient(grad_AD, gated_AM), ctx.sink)
        return grad, grad_AH.view(ctx.shape), grad_down, None, None, None


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertOptions:
    """Arguments of an experts' pass: an order for rows that stay on this rank, a slot for received ones."""

    counts: Sequence[int]
    sink: WeightSink | None
    maps: Fp8Maps
    slot: GradientSlot | None
    order: RowOrder | None
    eps: float
    for_backward: bool = False

    def packed_gradient(self, grad: Tensor) -> Tensor:
        """Returns the gradient of the output in codes, in the experts' order, AB."""
        if self.slot is not None:
            return self.slot.take()
        return _sort(pack_gradient(grad), self.order)


def _sort(packed: Tensor, order: RowOrder | None) -> Tensor:
    return packed if order is None else order.copy_rows(packed)


class ExpertMlp(torch.autograd.Function):
    """Applies experts to received rows, keeping their codes, or to own rows, keeping the norm's input."""

    @staticmethod
    def forward(  # noqa: PLR0913
        ctx: Any,
        rows: Tensor,
        packed: Tensor,
        weights: Tensor,
        gate_up_EHD: Tensor,
        down_EDM: Tensor,
        options: ExpertOptions,
        x: Tensor | None,
        norm_weight_D: Tensor | None,
    ) -> Tensor:
        """Keeps gate and up in FP8; routing weights are multiplied before `down`, as rows are narrower there."""
        maps = options.maps
        order = options.order
        counts = options.counts
        dtype = gate_up_EHD.dtype
        weights_A = weights if order is None else order.copy_weights(weights)
        # Gate and up, AH; gated and weighted in codes, AM; the result, AD.
        operand = unpack(_sort(packed, order), gate_up_EHD.shape[2])
        hidden_AH = grouped_rows_fp8(operand, maps.codes(gate_up_EHD).forward, counts, dtype)
        gated, kept = swiglu_quantize(hidden_AH, weights_A, power_of_two=maps.power_of_two)
        source = (packed,) if x is None else (x, norm_weight_D)
        ctx.save_for_backward(weights_A, *kept, gate_up_EHD, down_EDM, *source)
        ctx.options = options
        ctx.weights_dtype = weights.dtype
        if options.for_backward:
            return placeholder(rows.shape, rows)
        out_AD = grouped_rows_fp8(gated, maps.codes(down_EDM).forward, counts, dtype)
        return out_AD if order is None else order.sum_rows(out_AD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Reads the output gradient from the slot of received rows."""
        weights_A, codes, scales, gate_up_EHD, down_EDM, *source = ctx.saved_tensors
        options: ExpertOptions = ctx.options
        maps = options.maps
        counts = options.counts
        order = options.order
        sink = options.sink
        dtype = gate_up_EHD.dtype
        power_of_two = maps.power_of_two
        # Codes of the rows (AB, or NB if they stay on this rank) and of the output gradient (AD, in the experts'
        # order).
        packed = source[0] if order is None else repack(NormSource(source[0], source[1], options.eps))
        grad = unpack(options.packed_gradient(grads[0]), down_EDM.shape[1])
        # Through `down` (AM), the gate (AH), and gate and up (AD).
        grad_AM = grouped_rows_fp8(grad, maps.codes(down_EDM).backward, counts, dtype)
        grad_AH, gated_AM, grad_weights_A = swiglu_backward_from_codes(grad_AM, Quantized(codes, scales), weights_A)
        grad_hidden = maps.gradient(grad_AH)
        grad_rows = grouped_rows_fp8(grad_hidden, maps.codes(gate_up_EHD).backward, counts, dtype)
        # Operands of the weight gradients, in codes by columns; the rest is converted when they are computed.
        hidden_columns = quantize_columns(grad_AH, counts, power_of_two=power_of_two, min_amax=GRADIENTS_MIN_AMAX)
        gated_columns = quantize_columns(gated_AM, counts, power_of_two=power_of_two)

        def gate_up_gradient() -> Tensor:
            rows = unpack(_sort(packed, order), gate_up_EHD.shape[2])
            return grouped_weight_fp8(hidden_columns, requantize_columns(rows, counts, power_of_two=True), counts)

        def down_gradient() -> Tensor:
            columns = requantize_columns(grad, counts, power_of_two=True, min_amax=GRADIENTS_MIN_AMAX)
            return grouped_weight_fp8(columns, gated_columns, counts)

        assert grad_weights_A is not None
        grad_weights = grad_weights_A
        if order is not None:
            grad_rows = order.sum_rows(grad_rows)
            grad_weights = order.restore_weights(grad_weights)
        grad_gate_up = deliver_gradient(gate_up_EHD, gate_up_gradient, sink)
        grad_down = deliver_gradient(down_EDM, down_gradient, sink)
        return grad_rows, None, grad_weights.to(ctx.weights_dtype), grad_gate_up, grad_down, None, None, None
