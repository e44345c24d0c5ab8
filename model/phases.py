"""A stage's units of work, each run forward and backward by itself; between them the graph is cut.

One micro-batch's passage through a phase is one object. Values between phases are tuples of tensors;
gradients travel back in tuples of the same length, None where a value has none.

Shape legend: B sequences, T tokens of one, N = B T tokens, D hidden size, K experts per token, A arrived rows.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from comm.protocol import Arrived, Dispatcher, Handle, Label, Then, Work
from kernels.attention.documents import Documents
from model.block import Block
from model.gradients import GradientStore, WeightQueue
from model.precision.fp8.experts import ArrivedCodes, Mail, pack_gradient
from model.precision.fp8.maps import Fp8Maps
from model.precision.fp8.norm import stand_in
from model.precision.linear import WeightSink

Lane = Literal["compute", "comm"]
Values = tuple[Tensor, ...]
Gradients = tuple[Tensor | None, ...]


@dataclass(frozen=True, slots=True)
class Computed:
    """What a computation gives: values for the next phase, and its part of the step's loss, if any."""

    values: Values
    loss: Tensor | None = None


class _Entry:
    """Where the gradients of a phase's inputs arrive. The inputs are kept by what needs them, if anything."""

    gradients: Gradients = ()


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, entry: _Entry, *values: Tensor) -> Values:
        ctx.entry = entry
        ctx.set_materialize_grads(False)
        entered = tuple(value.view_as(value) for value in values)
        ctx.mark_non_differentiable(*(value for value in entered if not value.is_floating_point()))
        return entered

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, ...]:
        ctx.entry.gradients = grads
        return (None, None, *(None for _ in grads))


class ComputePhase:
    """A differentiable function of the values before it, with its weight gradients put off until `weight`.

    Between forward and backward it keeps the function's graph alone: inputs and outputs live on only where the graph
    has saved them.
    """

    def __init__(self, function: Callable[[Values, WeightSink | None], Computed], store: GradientStore | None) -> None:
        self._function = function
        self._store = store
        self._queue = WeightQueue()
        self._entry = _Entry()
        self._ends: tuple[GradientEdge | None, ...] = ()
        self._loss: Tensor | None = None

    def forward(self, values: Values) -> Values:
        """The function's values, cut off from its graph. Without a store nothing is kept for a backward."""
        if self._store is None:
            with torch.no_grad():
                return self._function(values, None).values
        with torch.enable_grad():
            self._entry.gradients = (None,) * len(values)
            anchor = torch.zeros((), requires_grad=True)
            entered: Values = _Enter.apply(anchor, self._entry, *values) if values else ()  # type: ignore[no-untyped-call]
            computed = self._function(entered, self._queue)
        self._ends = tuple(get_gradient_edge(value) if value.requires_grad else None for value in computed.values)
        self._loss = computed.loss
        return tuple(value.detach() for value in computed.values)

    def backward(self, gradients: Gradients) -> Gradients:
        """Gradients of the inputs; weight gradients of linear maps wait in the queue."""
        roots: list[GradientEdge] = []
        seeds: list[Tensor] = []
        for end, gradient in zip(self._ends, gradients, strict=True):
            if gradient is not None and end is not None:
                roots.append(end)
                seeds.append(gradient)
        if self._loss is not None:
            roots.append(get_gradient_edge(self._loss))
            seeds.append(torch.ones_like(self._loss))
        self._ends, self._loss = (), None
        torch.autograd.backward(roots, seeds)
        inputs, self._entry.gradients = self._entry.gradients, ()
        return inputs

    def weight(self) -> None:
        """The weight gradients of the last backward, added to the store."""
        assert self._store is not None
        self._queue.flush(self._store)


@dataclass(slots=True)
class Exchange:
    """What the three phases around one exchange share: who sends what to whom, and how much came.

    maps: of a model in FP8, whose rows and gradients go to experts as codes. mail: brings those of gradients.
    """

    dispatcher: Dispatcher
    label: Label
    maps: Fp8Maps | None = None
    mail: Mail = field(default_factory=Mail)
    handle: Handle | None = None
    counts: tuple[int, ...] = ()

    def plan(self, topk_ids_NK: Tensor, weights_NK: Tensor) -> Handle:
        """Starts the exchange of counts."""
        self.handle = self.dispatcher.plan(topk_ids_NK, weights_NK, self.label)
        return self.handle

    def planned(self) -> Handle:
        """The handle made by `plan`."""
        assert self.handle is not None
        return self.handle


class DispatchPhase:
    """(residual, rows, weights, ids) -> (residual, rows, arrived rows, arrived weights).

    In a model in FP8 rows only stand in for packed rows, which come behind the ids, go out behind the rows, and arrive
    last.
    """

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    def forward(self, values: Values) -> Work[Values]:
        """Sends a copy of each row to each of its experts."""
        residual, rows_BTD, weights_NK, ids_NK, *packed = values
        handle = self._exchange.plan(ids_NK, weights_NK)

        def finish(arrived: Arrived) -> Values:
            self._exchange.counts = arrived.counts
            if not packed:
                return residual, rows_BTD, arrived.rows_AD, arrived.weights_A
            rows_AD = stand_in((len(arrived.rows_AD), rows_BTD.shape[-1]), rows_BTD)
            return residual, rows_BTD, *packed, rows_AD, arrived.weights_A, arrived.rows_AD

        sent = packed[0] if packed else rows_BTD.flatten(0, 1)
        return Then(self._exchange.dispatcher.dispatch(sent, weights_NK, handle), finish)

    def backward(self, gradients: Gradients) -> Work[Gradients]:
        """Brings the gradients of rows and weights back to their tokens."""
        is_packed = self._exchange.maps is not None
        residual_BTD, own_BTD = gradients[:2]
        rows_AD, weights_A = gradients[3:5] if is_packed else gradients[2:]
        assert residual_BTD is not None
        assert rows_AD is not None
        assert weights_A is not None

        def finish(back: tuple[Tensor, Tensor]) -> Gradients:
            rows_BTD = back[0].view_as(residual_BTD)
            rows_BTD = rows_BTD if own_BTD is None else own_BTD + rows_BTD
            return residual_BTD, rows_BTD, back[1], None, *((None,) if is_packed else ())

        handle = self._exchange.planned()
        return Then(self._exchange.dispatcher.dispatch_backward(rows_AD, weights_A, handle), finish)


class CombinePhase:
    """(routed rows, base) -> (hidden,): the sum of each token's experts, added to residual and shared experts."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    def forward(self, values: Values) -> Work[Values]:
        """Brings each token's rows back and sums them."""
        routed_AD, base_BTD = values
        work = self._exchange.dispatcher.combine(routed_AD, self._exchange.planned())
        return Then(work, lambda summed_ND: (base_BTD + summed_ND.view_as(base_BTD),))

    def backward(self, gradients: Gradients) -> Work[Gradients]:
        """A copy of each token's gradient to each of its experts."""
        (hidden,) = gradients
        assert hidden is not None
        exchange, grad_ND = self._exchange, hidden.flatten(0, 1)
        if exchange.maps is None:
            work = exchange.dispatcher.combine_backward(grad_ND, exchange.planned())
            return Then(work, lambda routed_AD: (routed_AD, hidden))

        def finish(packed_AB: Tensor) -> Gradients:
            return exchange.mail.put(packed_AB, hidden.shape[-1], hidden.dtype), hidden

        packed_NB = pack_gradient(grad_ND, exchange.maps)
        return Then(exchange.dispatcher.combine_backward(packed_NB, exchange.planned()), finish)


Phase = ComputePhase | DispatchPhase | CombinePhase


class BalanceNote(Protocol):
    """Takes the balance loss of one layer and one micro-batch; gives its part of the step's loss."""

    def __call__(self, balance: Tensor) -> Tensor:
        """balance: summed over sequences, unscaled."""
        ...


def block_lanes(dense: bool) -> tuple[Lane, ...]:
    """Lanes of a block's phases: attend, dispatch, experts, combine; a dense block is one computation."""
    return ("compute",) if dense else ("compute", "comm", "compute", "comm")


def block_phases(
    block: Block,
    dispatcher: Dispatcher,
    store: GradientStore | None,
    note_balance: BalanceNote,
    label: Label,
    documents: Documents | None = None,
) -> list[Phase]:
    """The phases of one micro-batch through one block: (hidden,) -> (hidden,). `label`: of its exchanges."""
    if block.moe is None:
        return [ComputePhase(lambda values, sink: Computed((block.dense(values[0], sink, documents),)), store)]
    exchange = Exchange(dispatcher, label, block.maps)

    def attend(values: Values, sink: WeightSink | None) -> Computed:
        attended = block.attend(values[0], sink, documents)
        routing = attended.routing
        out = (attended.residual_BTD, attended.rows_BTD, routing.weights_NK, routing.ids_NK)
        packed = () if attended.packed_NB is None else (attended.packed_NB,)
        return Computed((*out, *packed), note_balance(routing.balance))

    def experts(values: Values, sink: WeightSink | None) -> Computed:
        if block.maps is None:
            *own, arrived, weights = values
            return Computed(block.apply_experts(own, arrived, weights, exchange.counts, sink))
        *own, arrived, weights, packed = values
        codes = ArrivedCodes(packed, exchange.mail)
        return Computed(block.apply_experts(own, arrived, weights, exchange.counts, sink, codes))

    return [
        ComputePhase(attend, store),
        DispatchPhase(exchange),
        ComputePhase(experts, store),
        CombinePhase(exchange),
    ]
