"""A block as its phases: attend, dispatch, experts, combine, or one phase if it is dense."""

from functools import partial
from typing import Any, Literal, Protocol

from torch import Tensor

from comm.context.alone import ALONE
from comm.context.protocol import ContextGroup
from comm.protocol import Dispatcher, Label
from kernels.attention.documents import Documents
from model.block import Block
from model.gradients import GradientStore
from model.phases.compute import Computed, ComputePhase
from model.phases.exchange import CombinePhase, DispatchPhase, Exchange
from model.precision.linear import WeightSink
from model.router import Routes
from model.values import ExpertOutput, Hidden, Received, Routed

Lane = Literal["compute", "comm"]
Phase = ComputePhase[Any, Any] | DispatchPhase | CombinePhase


class BalanceRecorder(Protocol):
    """Records the balance loss of one layer and one micro-batch, and returns its part of the step's loss."""

    def __call__(self, balance: Tensor) -> Tensor:
        """Records the balance loss.

        `balance`: the loss summed over sequences, unscaled.
        """
        ...


def block_lanes(*, is_dense: bool) -> tuple[Lane, ...]:
    """Returns the lanes of a block's phases: attend, dispatch, experts, combine, or one if it is dense."""
    return ("compute",) if is_dense else ("compute", "comm", "compute", "comm")


def block_phases(
    block: Block,
    dispatcher: Dispatcher,
    store: GradientStore | None,
    record_balance: BalanceRecorder,
    label: Label,
    documents: Documents | None = None,
    routes: Routes | None = None,
    context: ContextGroup = ALONE,
) -> list[Phase]:
    """Returns the phases of one micro-batch through one block, from `Hidden` to `Hidden`.

    `label` names its exchanges. `context` are the ranks that share each sequence.
    """

    def dense(hidden: Hidden, sink: WeightSink | None) -> Computed[Hidden]:
        return Computed(Hidden(block.dense(hidden.hidden_BTD, sink, documents)))

    route = None if routes is None else partial(routes.route, label)

    def attend(hidden: Hidden, sink: WeightSink | None) -> Computed[Routed]:
        attended = block.attend(hidden.hidden_BTD, sink, documents, route)
        routing = attended.routing
        routed = Routed(attended.residual_BTD, attended.rows, routing.weights_TK, routing.ids_TK)
        return Computed(routed, record_balance(routing.balance(documents, context)))

    def experts(received: Received, sink: WeightSink | None) -> Computed[ExpertOutput]:
        return Computed(block.apply_experts(received, sink))

    if block.moe is None:
        return [ComputePhase(dense, store)]
    exchange = Exchange(dispatcher, label, block.wire())
    return [
        ComputePhase(attend, store),
        DispatchPhase(exchange),
        ComputePhase(experts, store),
        CombinePhase(exchange),
    ]
