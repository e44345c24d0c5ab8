"""A block as its phases: attend, dispatch, experts, combine, or one phase if it is dense."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import Tensor

from comm.protocol import ALONE, ContextGroup, Dispatcher, Label
from kernels.attention.documents import Documents
from model.block import Attended, Block
from model.linear import GradientStore, WeightSink
from model.objective import BALANCE, LossSums
from model.phases.compute import CombinePhase, Computed, ComputePhase, DispatchPhase, Exchange
from model.phases.recomputed import RecomputedAttend, RecomputedCombine, RecomputedExperts, RecomputedPhase
from model.router import Route, Router, Routes, Routing
from model.values import ExpertOutput, Hidden, Received, Routed

Lane = Literal["compute", "comm"]
Phase = ComputePhase[Any, Any] | DispatchPhase | CombinePhase


@dataclass(frozen=True, slots=True)
class BalanceLoss:
    """Factor of the balance loss in a step's loss, and the sums that take every layer's, unscaled."""

    factor: float
    sums: LossSums

    def record(self, balance: Tensor) -> Tensor:
        """Records a layer's balance loss, and returns its part of the step's loss."""
        self.sums.add(BALANCE, balance)
        return self.scale(balance)

    def scale(self, balance: Tensor) -> Tensor:
        """Returns the part of a layer's balance loss in the step's loss."""
        return self.factor * balance


def block_lanes(*, is_dense: bool) -> tuple[Lane, ...]:
    """Returns the lanes of a block's phases: attend, dispatch, experts, combine, or one if it is dense."""
    return ("compute",) if is_dense else ("compute", "comm", "compute", "comm")


def block_phases(
    block: Block,
    dispatcher: Dispatcher,
    store: GradientStore | None,
    balance: BalanceLoss,
    label: Label,
    documents: Documents | None = None,
    routes: Routes | None = None,
    context: ContextGroup = ALONE,
) -> list[Phase]:
    """Returns the phases of one micro-batch through one block; without a store nothing is kept."""
    choose = None if routes is None else partial(routes.route, label)
    parts = _BlockParts(block, documents, context, balance, choose)
    again = store if block.recomputes else None
    if block.moe is None:
        return [
            ComputePhase(parts.dense, store)
            if again is None
            else RecomputedPhase(parts.mix, parts.add_mlp, parts.add_mlp_again, again)
        ]
    exchange = Exchange(dispatcher, label, block.wire())
    dispatch = DispatchPhase(exchange)
    if again is None:
        return [ComputePhase(parts.attend, store), dispatch, ComputePhase(parts.experts, store), CombinePhase(exchange)]
    attend = RecomputedAttend(parts.mix, parts.route, parts.route_again, block.moe.gate.id_dtype, again)
    experts = RecomputedExperts(parts.experts, parts.experts_again, again)
    return [attend, dispatch, experts, RecomputedCombine(exchange, attend, dispatch, experts)]


@dataclass(frozen=True, slots=True)
class _BlockParts:
    """Computations of one micro-batch in one block; `choose` chooses experts instead of the router."""

    block: Block
    documents: Documents | None
    context: ContextGroup
    balance: BalanceLoss
    choose: Route | None

    def mix(self, hidden: Hidden, sink: WeightSink | None) -> Computed[Hidden]:
        return Computed(Hidden(self.block.mix(hidden.hidden_BTD, sink, self.documents, self.context)))

    def add_mlp(self, hidden: Hidden, sink: WeightSink | None) -> Computed[Hidden]:
        return Computed(Hidden(self.block.add_mlp(hidden.hidden_BTD, sink)))

    def add_mlp_again(self, hidden: Hidden, sink: WeightSink | None) -> Computed[Hidden]:
        return Computed(Hidden(self.block.add_mlp(hidden.hidden_BTD, sink, for_backward=True)))

    def dense(self, hidden: Hidden, sink: WeightSink | None) -> Computed[Hidden]:
        return Computed(Hidden(self.block.dense(hidden.hidden_BTD, sink, self.documents, self.context)))

    def attend(self, hidden: Hidden, sink: WeightSink | None) -> Computed[Routed]:
        attended = self.block.attend(hidden.hidden_BTD, sink, self.documents, self.choose, self.context)
        return self._routed(attended, self.balance.record)

    def route(self, hidden: Hidden) -> Routed:
        return self._routed(self.block.route(hidden.hidden_BTD, self.choose), self.balance.record).values

    def route_again(self, hidden: Hidden, ids_TK: Tensor) -> Computed[Routed]:
        """Computes what `route` did, for its choices."""

        def choose(router: Router, logits_BTE: Tensor) -> Routing:
            return router.route_again(logits_BTE, ids_TK)

        return self._routed(self.block.route(hidden.hidden_BTD, choose), self.balance.scale)

    def experts(self, received: Received, sink: WeightSink | None) -> Computed[ExpertOutput]:
        return Computed(self.block.apply_experts(received, sink))

    def experts_again(self, received: Received, sink: WeightSink | None) -> Computed[ExpertOutput]:
        return Computed(self.block.apply_experts(received, sink, for_backward=True))

    def _routed(self, attended: Attended, loss: Callable[[Tensor], Tensor]) -> Computed[Routed]:
        routing = attended.routing
        routed = Routed(attended.residual_BTD, attended.rows, routing.weights_TK, routing.ids_TK)
        return Computed(routed, loss(routing.balance(self.documents, self.context)))
