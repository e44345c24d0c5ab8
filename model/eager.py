"""The dispatcher's explicit calls under plain autograd, for a model called as an ordinary module.

Shape legend: B sequences, T tokens of one, N tokens, K experts per token, D hidden size, A arrived rows.
"""

from typing import Any

import torch
from torch import Tensor

from comm.protocol import Arrived, Dispatcher, Handle, HomeDispatcher
from kernels.attention.documents import Documents
from model.block import Block
from model.router import Routing


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows_ND: Tensor, weights_NK: Tensor, dispatcher: Dispatcher, handle: Handle, counts: list[int]
    ) -> tuple[Tensor, Tensor]:
        ctx.dispatcher, ctx.handle = dispatcher, handle
        arrived = dispatcher.dispatch(rows_ND, weights_NK, handle).wait()
        counts.extend(arrived.counts)
        return arrived.rows_AD, arrived.weights_A

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        rows_ND, weights_NK = ctx.dispatcher.dispatch_backward(grads[0], grads[1], ctx.handle).wait()
        return rows_ND, weights_NK, None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_AD: Tensor, dispatcher: Dispatcher, handle: Handle) -> Tensor:
        ctx.dispatcher, ctx.handle = dispatcher, handle
        return dispatcher.combine(rows_AD, handle).wait()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.dispatcher.combine_backward(grads[0], ctx.handle).wait(), None, None


def dispatch(dispatcher: Dispatcher, rows_ND: Tensor, weights_NK: Tensor, handle: Handle) -> Arrived:
    """`Dispatcher.dispatch`, differentiable in rows and weights; returns when the rows are here."""
    counts: list[int] = []
    rows_AD, weights_A = _Dispatch.apply(rows_ND, weights_NK, dispatcher, handle, counts)  # type: ignore[no-untyped-call]
    return Arrived(rows_AD, weights_A, tuple(counts))


def combine(dispatcher: Dispatcher, rows_AD: Tensor, handle: Handle) -> Tensor:
    """`Dispatcher.combine`, differentiable; ND."""
    out: Tensor = _Combine.apply(rows_AD, dispatcher, handle)  # type: ignore[no-untyped-call]
    return out


def run_block(
    block: Block, dispatcher: Dispatcher, hidden_BTD: Tensor, documents: Documents | None
) -> tuple[Tensor, Routing | None]:
    """A whole layer, BTD -> BTD, and where its tokens went, if it is a MoE layer."""
    if block.moe is None:
        return block.dense(hidden_BTD, None, documents), None
    attended = block.attend(hidden_BTD, None, documents)
    routing, rows_ND = attended.routing, attended.rows_BTD.flatten(0, 1)
    handle = dispatcher.plan(routing.ids_NK, routing.weights_NK)
    if isinstance(dispatcher, HomeDispatcher):
        counts, order = dispatcher.at_home(handle)
        summed = block.moe.experts.at_home(rows_ND, routing.weights_NK, counts, order)
        base = block.shared(attended.residual_BTD, attended.rows_BTD, None)
    else:
        arrived = dispatch(dispatcher, rows_ND, routing.weights_NK, handle)
        routed, base = block.apply_experts(
            attended.residual_BTD, attended.rows_BTD, arrived.rows_AD, arrived.weights_A, arrived.counts, None
        )
        summed = combine(dispatcher, routed, handle)
    return base + summed.view_as(base), routing
