"""Routed experts in FP8, over rows that arrive in FP8 and serve as operands as they are.

Source: arXiv:2412.19437, section 3.3. Shape legend: N tokens, A rows in the experts' order, B bytes of a packed row, D
hidden size, E local experts, M expert intermediate size, H = 2 M.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from comm.protocol import RowOrder
from kernels.grouped_gemm import grouped_rows_fp8, grouped_weight_fp8
from kernels.quantize import quantize_1x128, quantize_columns, requantize_columns
from kernels.quantize.layout import GRADIENTS_MIN_AMAX, Quantized, pack, unpack
from kernels.swiglu import swiglu_backward_from_codes, swiglu_quantize
from model.precision.fp8.maps import Fp8Maps, give
from model.precision.fp8.norm import Source, stand_in
from model.precision.linear import WeightSink


class Mail:
    """Brings the gradient of the experts' output to their backward in FP8, past autograd, which knows no codes."""

    def __init__(self) -> None:
        self._packed_AB: Tensor | None = None

    def put(self, packed_AB: Tensor, num_columns: int, dtype: torch.dtype) -> Tensor:
        """Leaves the packed gradient; gives what autograd is handed in its place, AD."""
        self._packed_AB = packed_AB
        return stand_in((len(packed_AB), num_columns), packed_AB.new_empty((), dtype=dtype))

    def take(self) -> Tensor:
        """What was left, once."""
        packed_AB, self._packed_AB = self._packed_AB, None
        assert packed_AB is not None, "experts: a backward without the gradient of the output in FP8"
        return packed_AB


@dataclass(frozen=True, slots=True)
class ArrivedCodes:
    """Rows that arrived in FP8, AB, and what will bring the gradient of the experts' output."""

    packed_AB: Tensor
    mail: Mail


def pack_gradient(grad_ND: Tensor, maps: Fp8Maps) -> Tensor:
    """A gradient on its way to the experts, NB: in FP8 with power-of-two scales."""
    return pack(quantize_1x128(grad_ND.contiguous(), True, GRADIENTS_MIN_AMAX))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Options:
    """What an experts' pass is told beside its tensors. order: of rows that never leave this rank, as given by token;
    else the gradient comes by mail."""

    counts: Sequence[int]
    sink: WeightSink | None
    maps: Fp8Maps
    mail: Mail | None
    order: RowOrder | None
    eps: float


def _sort(packed_NB: Tensor, order: RowOrder | None) -> Tensor:
    """Rows in the experts' order."""
    return packed_NB if order is None else order.copy_rows(packed_NB)


class _ExpertMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        packed: Tensor,
        weights: Tensor,
        gate_up_EHD: Tensor,
        down_EDM: Tensor,
        options: _Options,
        x: Tensor | None,
        norm_weight_D: Tensor | None,
    ) -> Tensor:
        maps, order, counts, dtype = options.maps, options.order, options.counts, gate_up_EHD.dtype
        weights_A = weights if order is None else order.copy_weights(weights)
        operand = unpack(_sort(packed, order), gate_up_EHD.shape[2])
        hidden_AH = grouped_rows_fp8(operand, maps.codes(gate_up_EHD).forward, counts, dtype)
        gated, kept = swiglu_quantize(hidden_AH, weights_A, maps.power_of_two)
        out_AD = grouped_rows_fp8(gated, maps.codes(down_EDM).forward, counts, dtype)
        source = (packed,) if x is None else (x, norm_weight_D)
        ctx.save_for_backward(weights_A, *kept, gate_up_EHD, down_EDM, *source)
        ctx.options, ctx.weights_dtype = options, weights.dtype
        return out_AD if order is None else order.sum_rows(out_AD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weights_A, codes, scales, gate_up_EHD, down_EDM, *source = ctx.saved_tensors
        options: _Options = ctx.options
        maps, counts, order, sink = options.maps, options.counts, options.order, options.sink
        dtype, power_of_two = gate_up_EHD.dtype, maps.power_of_two
        packed = source[0] if order is None else Source(source[0], source[1], options.eps).pack_again(maps)
        mail = options.mail
        grad = unpack(mail.take() if mail else _sort(pack_gradient(grads[0], maps), order), down_EDM.shape[1])
        grad_AM = grouped_rows_fp8(grad, maps.codes(down_EDM).backward, counts, dtype)
        grad_AH, gated_AM, grad_weights_A = swiglu_backward_from_codes(grad_AM, Quantized(codes, scales), weights_A)
        grad_hidden = maps.gradient(grad_AH)
        grad_rows = grouped_rows_fp8(grad_hidden, maps.codes(gate_up_EHD).backward, counts, dtype)
        hidden_columns = quantize_columns(grad_AH, counts, power_of_two, GRADIENTS_MIN_AMAX)
        gated_columns = quantize_columns(gated_AM, counts, power_of_two)

        def gate_up_gradient() -> Tensor:
            rows = unpack(_sort(packed, order), gate_up_EHD.shape[2])
            return grouped_weight_fp8(hidden_columns, requantize_columns(rows, counts, True), counts)

        def down_gradient() -> Tensor:
            columns = requantize_columns(grad, counts, True, GRADIENTS_MIN_AMAX)
            return grouped_weight_fp8(columns, gated_columns, counts)

        assert grad_weights_A is not None
        grad_weights = grad_weights_A
        if order is not None:
            grad_rows, grad_weights = order.sum_rows(grad_rows), order.restore_weights(grad_weights)
        given = give(gate_up_EHD, gate_up_gradient, sink), give(down_EDM, down_gradient, sink)
        return grad_rows, None, grad_weights.to(ctx.weights_dtype), *given, None, None, None


def expert_mlp(
    rows: Tensor,
    packed: Tensor,
    weights: Tensor,
    gate_up_EHD: Tensor,
    down_EDM: Tensor,
    counts: Sequence[int],
    maps: Fp8Maps,
    *,
    sink: WeightSink | None = None,
    mail: Mail | None = None,
    home: tuple[RowOrder, Source] | None = None,
) -> Tensor:
    """Rows through their experts, times their routing weight (applied before `down`): AD; ND at home.

    Args:
        rows: takes the rows' gradient, AD; ND at home.
        packed: the rows, AB; NB at home.
        weights: routing weight of each row, A; of each choice, NK, at home.
        gate_up_EHD: gate rows first.
        down_EDM: of each expert.
        counts: rows of each expert.
        maps: of the model.
        sink: takes the weights' gradients.
        mail: brings the output's gradient. None: autograd does, in the experts' order by token.
        home: of rows that never leave this rank: their order, and from what the backward makes them again.
    """
    order, source = (None, None) if home is None else home
    options = _Options(
        counts=counts, sink=sink, maps=maps, mail=mail, order=order, eps=0.0 if source is None else source.eps
    )
    made_of = (None, None) if source is None else (source.x.detach(), source.norm_weight_D.detach())
    out: Tensor = _ExpertMlp.apply(  # type: ignore[no-untyped-call]
        rows, packed, weights, gate_up_EHD, down_EDM, options, *made_of
    )
    return out
