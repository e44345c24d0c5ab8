"""The dispatcher's explicit calls under plain autograd, for a model called as an ordinary module.

Shape legend: B sequences, T tokens of one, N tokens, K experts per token, D hidden size, A arrived rows.
"""

from typing import Any

import torch
from torch import Tensor

from comm.protocol import Arrived, Dispatcher, Handle, HomeDispatcher
from kernels.attention.documents import Documents
from model.block import Block
from model.precision.fp8.experts import ArrivedCodes, Mail, pack_gradient
from model.precision.fp8.maps import Fp8Maps
from model.precision.fp8.norm import Source, stand_in
from model.router import Routing


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows_ND: Tensor,
        packed_NB: Tensor | None,
        weights_NK: Tensor,
        dispatcher: Dispatcher,
        handle: Handle,
        counts: list[int],
    ) -> tuple[Tensor, ...]:
        ctx.dispatcher, ctx.handle = dispatcher, handle
        arrived = dispatcher.dispatch(rows_ND if packed_NB is None else packed_NB, weights_NK, handle).wait()
        counts.extend(arrived.counts)
        if packed_NB is None:
            return arrived.rows_AD, arrived.weights_A
        ctx.mark_non_differentiable(arrived.rows_AD)
        rows_AD = stand_in((len(arrived.rows_AD), rows_ND.shape[1]), rows_ND)
        return rows_AD, arrived.weights_A, arrived.rows_AD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows_ND, weights_NK = ctx.dispatcher.dispatch_backward(grads[0], grads[1], ctx.handle).wait()
        return rows_ND, None, weights_NK, None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows_AD: Tensor, dispatcher: Dispatcher, handle: Handle, maps: Fp8Maps | None, mail: Mail | None
    ) -> Tensor:
        ctx.dispatcher, ctx.handle, ctx.maps, ctx.mail = dispatcher, handle, maps, mail
        return dispatcher.combine(rows_AD, handle).wait()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_ND, maps = grads[0], ctx.maps
        if maps is None:
            return ctx.dispatcher.combine_backward(grad_ND, ctx.handle).wait(), None, None, None, None
        packed_AB = ctx.dispatcher.combine_backward(pack_gradient(grad_ND, maps), ctx.handle).wait()
        return ctx.mail.put(packed_AB, grad_ND.shape[1], grad_ND.dtype), None, None, None, None


def dispatch(dispatcher: Dispatcher, rows_ND: Tensor, weights_NK: Tensor, handle: Handle) -> Arrived:
    """`Dispatcher.dispatch`, differentiable in rows and weights; returns when the rows are here."""
    counts: list[int] = []
    rows_AD, weights_A = _Dispatch.apply(  # type: ignore[no-untyped-call]
        rows_ND, None, weights_NK, dispatcher, handle, counts
    )
    return Arrived(rows_AD, weights_A, tuple(counts))


def combine(dispatcher: Dispatcher, rows_AD: Tensor, handle: Handle) -> Tensor:
    """`Dispatcher.combine`, differentiable; ND."""
    out: Tensor = _Combine.apply(rows_AD, dispatcher, handle, None, None)  # type: ignore[no-untyped-call]
    return out


def run_block(
    block: Block, dispatcher: Dispatcher, hidden_BTD: Tensor, documents: Documents | None
) -> tuple[Tensor, Routing | None]:
    """A whole layer, BTD -> BTD, and where its tokens went, if it is a MoE layer."""
    if block.moe is None:
        return block.dense(hidden_BTD, None, documents), None
    attended = block.attend(hidden_BTD, None, documents)
    routing, packed = attended.routing, attended.packed_NB
    rows_ND, own = attended.rows_BTD.flatten(0, 1), (attended.residual_BTD, attended.rows_BTD, packed)
    handle = dispatcher.plan(routing.ids_NK, routing.weights_NK)
    if isinstance(dispatcher, HomeDispatcher):
        counts, order = dispatcher.at_home(handle)
        norm = block.post_attention_layernorm
        source = Source(attended.residual_BTD, norm.weight, norm.eps)
        summed = block.moe.experts.at_home(rows_ND, routing.weights_NK, counts, order, packed, source)
        base = block.shared(*own, sink=None)
    elif packed is None:
        arrived = dispatch(dispatcher, rows_ND, routing.weights_NK, handle)
        routed, base = block.apply_experts(own[:2], arrived.rows_AD, arrived.weights_A, arrived.counts, None)
        summed = combine(dispatcher, routed, handle)
    else:
        routed, base, mail = _apply_in_fp8(block, dispatcher, handle, own, routing.weights_NK)
        summed = _Combine.apply(routed, dispatcher, handle, block.maps, mail)  # type: ignore[no-untyped-call]
    return base + summed.view_as(base), routing


def _apply_in_fp8(
    block: Block,
    dispatcher: Dispatcher,
    handle: Handle,
    own: tuple[Tensor, Tensor, Tensor | None],
    weights_NK: Tensor,
) -> tuple[Tensor, Tensor, Mail]:
    """Rows sent in FP8, through their experts: routed rows, the shared part, and what brings the former's gradient."""
    counts: list[int] = []
    rows_AD, weights_A, packed_AB = _Dispatch.apply(  # type: ignore[no-untyped-call]
        own[1].flatten(0, 1), own[2], weights_NK, dispatcher, handle, counts
    )
    mail = Mail()
    given = [tensor for tensor in own if tensor is not None]
    routed, base = block.apply_experts(given, rows_AD, weights_A, counts, None, ArrivedCodes(packed_AB, mail))
    return routed, base, mail
