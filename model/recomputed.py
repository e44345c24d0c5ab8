"""Phases of a layer that keeps little between forward and backward (`recompute=[layer]`).

It keeps its input and what attention keeps: latents and the heads' output. The backward of a layer first recomputes the
residual after attention, and from it the rows and their routing. A MoE layer sends the rows to their experts again,
with the plan of its forward. Then each computation runs again right before its backward. Only tensors that a
recomputation does not give bit for bit are kept in addition: chosen experts, and the weights of received rows.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from comm.protocol import MappedWork, Work
from model.attention.core import recompute_result, recomputes_result
from model.copies import CopiedExperts
from model.linear import GradientStore, WeightSink
from model.phases import CombinePhase, Computed, ComputePhase, DispatchPhase, Exchange, Out, Recording, record
from model.precision.linears import Rows
from model.values import (
    ExpertGradients,
    ExpertOutput,
    Gradients,
    Hidden,
    HiddenGradients,
    Received,
    Routed,
)

Function = Callable[[Hidden, WeightSink | None], Computed[Out]]


class _ResidualSource:
    """Source of the residual after attention: the layer's input if that is enough, else the residual."""

    def __init__(self, hidden_BTD: Tensor, residual_BTD: Tensor, attention: Recording) -> None:
        (end,) = attention.ends
        assert end is not None
        # x + attention(x) costs one output projection if attention keeps what the heads mixed.
        self._node = end.node if recomputes_result(end.node) else None
        self.kept_BTD = residual_BTD if self._node is None else hidden_BTD

    def residual(self) -> Tensor:
        """Returns the residual, BTD. Must be called before the backward of attention."""
        return self.kept_BTD if self._node is None else recompute_result(self._node, self.kept_BTD)


class RecomputedPhase(ComputePhase[Hidden, Out]):
    """Attention with its graph, and the rest of its phase, which the backward computes again."""

    def __init__(
        self,
        mix: Function[Hidden],
        rest: Function[Out],
        rest_again: Function[Out],
        store: GradientStore,
    ) -> None:
        """Stores the arguments; the result of `rest_again`, for a backward, may have no numbers."""
        super().__init__(rest, store)
        self._mix = mix
        self._again = rest_again
        self._attention: Recording | None = None
        self._source: _ResidualSource | None = None

    def forward(self, values: Hidden) -> Out:
        """Returns the phase's values; only attention is recorded."""
        # Attention costs most to recompute and keeps little, so its graph stays.
        mixed, self._attention = record(self._mix, values, self._queue)
        self._source = _ResidualSource(values.hidden_BTD, mixed.hidden_BTD, self._attention)
        with torch.no_grad():
            return self._run_rest(mixed)

    def recompute(self) -> Out:
        """Records the rest of the phase and returns its values, before the backward or in it."""
        assert self._source is not None
        source = self._source
        self._source = None
        # The rest of the phase from the residual, now with a graph.
        values, self._recorded = record(self._rest_again(), Hidden(source.residual()), self._queue)
        return values

    def backward(self, gradients: Gradients) -> Gradients:
        """Returns the gradients of the input, through the rest of the phase, then through attention."""
        if self._recorded is None:
            self.recompute()
        # Backward order: the rest of the phase (norm, router or network), then attention.
        gradients = super().backward(gradients)
        assert self._attention is not None
        attention = self._attention
        self._attention = None
        return attention.backward(gradients)

    def kept(self) -> Iterator[Tensor]:
        """Yields what attention keeps, the source of the residual, and what was recomputed."""
        yield from super().kept()
        if self._attention is not None:
            yield from self._attention.kept()
        if self._source is not None:
            yield self._source.kept_BTD

    def _run_rest(self, mixed: Hidden) -> Out:
        return self._function(mixed, None).values

    def _rest_again(self) -> Function[Out]:
        return self._again


class RecomputedAttend(RecomputedPhase[Routed]):
    """Attention, norm and router of a MoE layer; keeps the chosen experts in few bytes."""

    def __init__(
        self,
        mix: Function[Hidden],
        route: Callable[[Hidden], Routed],
        route_again: Callable[[Hidden, Tensor], Computed[Routed]],
        id_dtype: torch.dtype,
        store: GradientStore,
    ) -> None:
        """Stores the arguments; `route` counts and records its choices, `route_again` does not."""

        def first(hidden: Hidden, sink: WeightSink | None) -> Computed[Routed]:
            return Computed(route(hidden))

        super().__init__(mix, first, first, store)
        self._route_again = route_again
        self._id_dtype = id_dtype
        self._ids_TK: Tensor | None = None

    def kept(self) -> Iterator[Tensor]:
        """Yields what attention keeps, the source of the residual, and the chosen experts."""
        yield from super().kept()
        if self._ids_TK is not None:
            yield self._ids_TK

    def _run_rest(self, mixed: Hidden) -> Routed:
        # The router counts choices only if gradients are recorded. This graph is not used.
        with torch.enable_grad():
            routed = self._function(mixed, None).values
        self._ids_TK = routed.ids_TK.to(self._id_dtype)
        return routed.with_tensors(tensor.detach() for tensor in routed.tensors())

    def _rest_again(self) -> Function[Routed]:
        assert self._ids_TK is not None
        # The same choices, not a second decision: rounding may differ between the two graphs.
        ids_TK = self._ids_TK.to(torch.int64)
        self._ids_TK = None
        route_again = self._route_again
        return lambda hidden, sink: route_again(hidden, ids_TK)


class RecomputedExperts(ComputePhase[Received, ExpertOutput]):
    """Experts; the backward records their graph. Keeps the weights of received rows."""

    def __init__(
        self,
        function: Callable[[Received, WeightSink | None], Computed[ExpertOutput]],
        again: Callable[[Received, WeightSink | None], Computed[ExpertOutput]],
        store: GradientStore,
    ) -> None:
        """Stores the arguments; the result of `again`, for a backward, may have no numbers."""
        super().__init__(function, store)
        self._again = again
        self._weights_A: Tensor | None = None
        self._counts: tuple[int, ...] = ()
        self._copies: CopiedExperts | None = None
        self._received: Received | None = None

    def forward(self, values: Received) -> ExpertOutput:
        """Returns the experts' output without recording it."""
        # Routing weights of received rows would need another exchange; the rows are sent again.
        self._weights_A = values.weights_A
        self._counts = values.counts
        self._copies = values.copies
        with torch.no_grad():
            return self._function(values, None).values

    def receive(self, routed: Routed, received: Rows) -> None:
        """Takes the recomputed input: the rank's own tokens, and the rows that arrived again."""
        assert self._weights_A is not None
        weights_A = self._weights_A
        self._weights_A = None
        # Everything that `forward` saw, in the order of the first exchange.
        self._received = Received(routed.residual_BTD, routed.rows, received, weights_A, self._counts, self._copies)

    def backward(self, gradients: Gradients) -> Gradients:
        """Computes the experts again, and returns the gradients of their input."""
        assert self._received is not None
        received = self._received
        self._received = None
        self._recorded = record(self._again, received, self._queue)[1]
        # Only the graph may hold the rows, so that they are freed during the backward.
        del received
        return super().backward(gradients)

    def kept(self) -> Iterator[Tensor]:
        """Yields the weights of received rows, and the rows if they have arrived again."""
        yield from super().kept()
        if self._weights_A is not None:
            yield self._weights_A
        if self._received is not None:
            yield from self._received.tensors()


class RecomputedCombine(CombinePhase):
    """Combine; its backward also recomputes the rows of the layer and sends them to their experts again."""

    def __init__(
        self, exchange: Exchange, attend: RecomputedAttend, dispatch: DispatchPhase, experts: RecomputedExperts
    ) -> None:
        super().__init__(exchange)
        self._attend = attend
        self._dispatch = dispatch
        self._experts = experts

    def backward(self, gradients: HiddenGradients) -> Work[ExpertGradients]:
        """Starts both exchanges to the experts; the gradient's hides the recomputation of the rows."""
        # The exchange of gradients runs while this rank recomputes the rows that it sends next.
        gradients_work = super().backward(gradients)
        routed = self._attend.recompute()
        rows_work = self._dispatch.send_again(routed)
        experts = self._experts

        def finish(expert_gradients: ExpertGradients) -> ExpertGradients:
            experts.receive(routed, rows_work.wait())
            return expert_gradients

        return MappedWork(gradients_work, finish)
