"""Implements the dispatcher that sends rows to their experts' ranks with one all-to-all each way."""

# Shape legend: S copies sent, A arrived rows, B bytes of a row as sent.

from torch import Tensor
from torch.distributed import ProcessGroup

from comm.dispatch.all_to_all.plan import AllToAllCounts, AllToAllPlanner, AllToAllRoute, PlannedHandle
from comm.dispatch.local import dense
from comm.dispatch.process_group import ExchangeGroup, Observers, RowFormat, bytes_of
from comm.dispatch.traffic import Spread
from comm.lane import Lane
from comm.layout import Layout
from comm.protocol import Arrived, Handle, Label, Work, own_handle
from kernels.permute import permute


class AllToAllHandle(PlannedHandle[AllToAllCounts, AllToAllRoute]):
    """Handle of an `AllToAllDispatcher`."""


class AllToAllDispatcher:
    """Dispatcher over an expert group with one all-to-all. Member i holds experts i*L to (i+1)*L - 1.

    Rows of one local expert arrive by source rank, then by token, independent of timing. If a token reaches more than
    `max_nodes` nodes, the first use of its plan raises NodeCapError on all ranks. Every member of the group builds one.
    """

    def __init__(
        self,
        group: ProcessGroup,
        num_experts: int,
        layout: Layout,
        lane: Lane,
        observers: Observers,
        max_nodes: int | None = None,
    ) -> None:
        self._group = ExchangeGroup("expert", group, layout, observers)
        self._planner = AllToAllPlanner(self._group, num_experts, max_nodes, observers.traffic)
        self.num_local_experts = self._planner.num_local_experts
        self._lane = lane
        self._traffic = observers.traffic

    def plan(self, ids_TK: Tensor, weights_TK: Tensor | None = None, label: Label | None = None) -> Handle:
        """Starts the exchange of counts by (destination rank, local expert) on the lane."""
        work = self._lane.submit(lambda: self._planner.exchange(ids_TK, label))
        return AllToAllHandle(ids_TK.shape[0], label, work)

    def dispatch(self, rows_TD: Tensor, weights_TK: Tensor, handle: Handle) -> Work[Arrived]:
        """Sends a copy of each token's row, with its weight, to each of the token's experts."""
        own = own_handle(handle, AllToAllHandle)

        def run() -> Arrived:
            route = own.route(self._planner.complete)
            # Pack each copy with its weight, sorted by expert: SB.
            weights_S1 = route.order.copy_weights(weights_TK)[:, None]
            form = RowFormat.of(rows_TD, weights_S1)
            bytes_SB = form.allocate(len(weights_S1), rows_TD.device)
            route.order.copy_rows(rows_TD, form.part(bytes_SB, 0))
            form.part(bytes_SB, 1).copy_(weights_S1)
            # Arrived rows, AB, then sorted by local expert.
            bytes_AB = self._send("dispatch", own, form, bytes_SB)
            rows_AD = _reorder(form.part(bytes_AB, 0), route.sorted_A)
            weights_A1 = _reorder(form.part(bytes_AB, 1), route.sorted_A)
            return Arrived(rows_AD, weights_A1.view(-1), route.counts)

        return self._lane.submit(run)

    def dispatch_again(self, rows_TD: Tensor, handle: Handle) -> Work[Tensor]:
        """Sends a copy of each token's row to each of its experts; AD."""
        return self._send_rows("dispatch again", rows_TD, handle)

    def combine(self, rows_AD: Tensor, handle: Handle) -> Work[Tensor]:
        """Returns the unweighted sum over each token's experts, in the order of its choices; TD."""
        own = own_handle(handle, AllToAllHandle)

        def run() -> Tensor:
            route = own.route(self._planner.complete)
            form = RowFormat.of(rows_AD)
            bytes_SB = self._send_back("combine", own, form, bytes_of(_reorder(rows_AD, route.arrival_A)))
            return route.order.sum_rows(form.part(bytes_SB, 0))

        return self._lane.submit(run)

    def dispatch_backward(
        self, grad_rows_AD: Tensor, grad_weights_A: Tensor, handle: Handle
    ) -> Work[tuple[Tensor, Tensor]]:
        """Computes the gradients of rows, summed per token (TD), and of weights (TK)."""
        own = own_handle(handle, AllToAllHandle)

        def run() -> tuple[Tensor, Tensor]:
            route = own.route(self._planner.complete)
            form = RowFormat.of(grad_rows_AD, grad_weights_A[:, None])
            bytes_AB = form.allocate(len(grad_rows_AD), grad_rows_AD.device)
            _reorder(grad_rows_AD, route.arrival_A, form.part(bytes_AB, 0))
            _reorder(grad_weights_A[:, None], route.arrival_A, form.part(bytes_AB, 1))
            bytes_SB = self._send_back("dispatch backward", own, form, bytes_AB)
            grad_weights_TK = route.order.restore_weights(form.part(bytes_SB, 1).reshape(-1))
            return route.order.sum_rows(form.part(bytes_SB, 0)), grad_weights_TK

        return self._lane.submit(run)

    def combine_backward(self, grad_rows_TD: Tensor, handle: Handle) -> Work[Tensor]:
        """Sends a copy of each token's gradient to each of its experts' rows; AD."""
        return self._send_rows("combine backward", grad_rows_TD, handle)

    def close(self) -> None:
        """Does nothing: there is nothing to free."""

    def _send_rows(self, name: str, rows_TD: Tensor, handle: Handle) -> Work[Tensor]:
        own = own_handle(handle, AllToAllHandle)

        def run() -> Tensor:
            route = own.route(self._planner.complete)
            form = RowFormat.of(rows_TD)
            bytes_AB = self._send(name, own, form, bytes_of(route.order.copy_rows(rows_TD)))
            return _reorder(form.part(bytes_AB, 0), route.sorted_A)

        return self._lane.submit(run)

    def _send(self, name: str, own: AllToAllHandle, form: RowFormat, bytes_SB: Tensor) -> Tensor:
        """Sends copies of tokens to their experts' ranks; AB."""
        route = own.route(self._planner.complete)
        return self._exchange(name, own, form, bytes_SB, route.sent, route.received)

    def _send_back(self, name: str, own: AllToAllHandle, form: RowFormat, bytes_AB: Tensor) -> Tensor:
        """Sends rows back to their tokens' ranks; SB."""
        route = own.route(self._planner.complete)
        return self._exchange(name, own, form, bytes_AB, route.received, route.sent)

    def _exchange(
        self,
        name: str,
        own: AllToAllHandle,
        form: RowFormat,
        bytes_NB: Tensor,
        sent: tuple[int, ...],
        received: tuple[int, ...],
    ) -> Tensor:
        group = self._group
        least = own.route(self._planner.complete).min_rows_across_nodes
        layer = None if own.label is None else own.label.layer
        self._traffic.add_predicted(layer, Spread.of(sent, group.nodes, group.place), form.bytes_per_row, least)
        return group.start(bytes_NB, sent, received, name, own.label).wait()


def _reorder(rows_ND: Tensor, source_N: Tensor | None, out_ND: Tensor | None = None) -> Tensor:
    """Gathers rows by index into a contiguous result, `out_ND` if given; None keeps their order."""
    if source_N is not None:
        return permute(dense(rows_ND), source_N, out_ND)
    return rows_ND.contiguous() if out_ND is None else out_ND.copy_(rows_ND)
