"""The two phases that exchange rows between a block's attention and its experts, and back.

Shape legend: N = B T, A received rows.
"""

from dataclasses import dataclass

from torch import Tensor

from comm.protocol import Arrived, Dispatcher, Handle, Label, MappedWork, Work
from model.precision.linears import Rows, Wire
from model.values import (
    ExpertGradients,
    ExpertOutput,
    Hidden,
    HiddenGradients,
    Received,
    ReceivedGradients,
    Routed,
    RoutedGradients,
)


@dataclass(slots=True)
class Exchange:
    """Shared state of the three phases around one exchange: its plan and the form of its rows."""

    dispatcher: Dispatcher
    label: Label
    wire: Wire
    handle: Handle | None = None

    def plan(self, ids_TK: Tensor, weights_TK: Tensor) -> Handle:
        """Starts the exchange of counts."""
        self.handle = self.dispatcher.plan(ids_TK, weights_TK, self.label)
        return self.handle

    def planned(self) -> Handle:
        """Returns the handle created by `plan`."""
        assert self.handle is not None
        return self.handle


class DispatchPhase:
    """Sends a copy of each token's row to each of its experts."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    def forward(self, routed: Routed) -> Work[Received]:
        """Starts the exchange of rows and routing weights."""
        wire = self._exchange.wire
        handle = self._exchange.plan(routed.ids_TK, routed.weights_TK)

        def finish(arrived: Arrived) -> Received:
            received = wire.unpack(arrived.rows_AD, routed.rows)
            return Received(routed.residual_BTD, routed.rows, received, arrived.weights_A, arrived.counts)

        return MappedWork(self._exchange.dispatcher.dispatch(wire.pack(routed.rows), routed.weights_TK, handle), finish)

    def send_again(self, routed: Routed) -> Work[Rows]:
        """Starts another exchange of the same rows, before the backward, if those that arrived were not kept."""
        wire = self._exchange.wire
        rows = routed.rows
        work = self._exchange.dispatcher.dispatch_again(wire.pack(rows), self._exchange.planned())
        return MappedWork(work, lambda received: wire.unpack(received, rows))

    def backward(self, gradients: ReceivedGradients) -> Work[RoutedGradients]:
        """Starts the return of the gradients of rows and weights to their tokens."""
        residual_BTD = gradients.residual_BTD
        own_BTD = gradients.own_BTD

        def finish(back: tuple[Tensor, Tensor]) -> RoutedGradients:
            rows_BTD = back[0].view_as(residual_BTD)
            weights_TK = back[1]
            return RoutedGradients(residual_BTD, rows_BTD if own_BTD is None else own_BTD + rows_BTD, weights_TK)

        handle = self._exchange.planned()
        work = self._exchange.dispatcher.dispatch_backward(gradients.received_AD, gradients.weights_A, handle)
        return MappedWork(work, finish)


class CombinePhase:
    """Sums each token's rows from its experts, and adds residual and shared experts."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    def forward(self, output: ExpertOutput) -> Work[Hidden]:
        """Starts the return of each token's rows."""
        base_BTD = output.base_BTD
        work = self._exchange.dispatcher.combine(output.routed_AD, self._exchange.planned())
        return MappedWork(work, lambda summed_ND: Hidden(base_BTD + summed_ND.view_as(base_BTD)))

    def backward(self, gradients: HiddenGradients) -> Work[ExpertGradients]:
        """Starts the exchange of a copy of each token's gradient for each of its experts."""
        grad_BTD = gradients.hidden_BTD
        exchange = self._exchange
        assert grad_BTD is not None
        grad_ND = grad_BTD.flatten(0, 1)

        def finish(received: Tensor) -> ExpertGradients:
            return ExpertGradients(exchange.wire.unpack_gradient(received, grad_ND), grad_BTD)

        packed = exchange.wire.pack_gradient(grad_ND)
        return MappedWork(exchange.dispatcher.combine_backward(packed, exchange.planned()), finish)
