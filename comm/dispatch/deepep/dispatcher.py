"""Implements the dispatcher over DeepEP's kernels, which send a row once to each rank of its experts.

Counts are exchanged, and the host waits for them, in the first dispatch of a plan. It makes the handle that every later
exchange uses.
"""

# Shape legend: R rows received (one for each token with experts here), A arrived rows (one for each of those experts),
# M members of the group, N its nodes.

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from comm.dispatch.all_to_all import num_local_experts
from comm.dispatch.deepep.buffer import DeepEPRoute, ExpertBuffer, Library, ReceivedRows
from comm.dispatch.deepep.package import BufferShape, load_package
from comm.dispatch.node_cap import nodes_of_experts, touched_nodes, verify_cap
from comm.dispatch.process_group import ExchangeGroup, Observers
from comm.dispatch.traffic import Spread
from comm.lane import ClosesOnSuccess, Lane
from comm.layout import Layout
from comm.protocol import Arrived, Handle, Label, Work, own_handle
from comm.watchdog.collective_log import group_name

_BYTES_PER_CHOICE = 8  # an id and a weight are sent with each row in both directions


@dataclass(frozen=True, slots=True)
class _Planned:
    ids_TK: Tensor  # choices in DeepEP's dtype
    touched_TN: Tensor  # mask of the nodes that each token touches
    # tokens that reach each member and each node (M + N), then each member's tokens over the cap (M). The copy to the
    # host may still be running.
    numbers: Tensor


@dataclass(frozen=True, slots=True)
class _PlannedTraffic:
    rows: Spread
    min_rows_across_nodes: int


class DeepEPHandle:
    """Routing of one micro-batch. Owns DeepEP's handles; only the lane uses its contents.

    `traffic`, the predicted rows, is None until the first dispatch. There is a route for each dtype of rows: between
    nodes, DeepEP splits its work by the bytes of a row, and a handle is only valid for the split that made it.
    """

    def __init__(self, num_tokens: int, label: Label | None, work: Work[_Planned]) -> None:
        self.label = label
        self.traffic: _PlannedTraffic | None = None
        self.routes: dict[torch.dtype, DeepEPRoute] = {}
        self._num_tokens = num_tokens
        self._work = work

    @property
    def num_tokens(self) -> int:
        """Number of tokens of this rank, T."""
        return self._num_tokens

    def planned(self) -> _Planned:
        """Returns the prepared choices. Called on the lane."""
        return self._work.wait()


class DeepEPDispatcher(ClosesOnSuccess):
    """Dispatcher over an expert group with DeepEP's kernels. Member i holds experts i*L to (i+1)*L - 1.

    Rows of one local expert arrive by source rank, then by token. They are bfloat16; those to experts may also be
    uint8: `hidden_size` codes of float8_e4m3fn, then float32 scales. Weights are float32.
    """

    def __init__(
        self,
        group: ProcessGroup,
        num_experts: int,
        layout: Layout,
        lane: Lane,
        observers: Observers,
        shape: BufferShape,
        max_nodes: int | None = None,
        library: Library | None = None,
    ) -> None:
        """Builds the dispatcher of one member. All members build and close theirs at the same points.

        DeepEP does not report what it sends, so rows and bytes are only predicted, on the rank that owns the tokens. If
        a token reaches more than `max_nodes` nodes, the first dispatch of the plan raises NodeCapError on all ranks.
        `library` replaces the installed package.
        """
        self._group = ExchangeGroup("expert", group, layout, observers)
        self.num_local_experts = num_local_experts(num_experts, len(self._group.members))
        self._buffer = ExpertBuffer(library or load_package(), group, num_experts, shape)
        self._num_sources = shape.max_tokens * len(self._group.members)
        self._lane = lane
        self._observers = observers
        device = self._buffer.device
        self._num_nodes = len(set(self._group.nodes))
        self._max_nodes = self._num_nodes if max_nodes is None else max_nodes
        self._member_of_expert_E = nodes_of_experts(num_experts, range(len(self._group.members))).to(device)
        self._node_of_expert_E = nodes_of_experts(num_experts, self._group.nodes).to(device)

    def close(self) -> None:
        """Frees the buffer. All members call it at the same point, after the lane has finished."""
        self._buffer.close()

    def plan(self, ids_TK: Tensor, weights_TK: Tensor | None = None, label: Label | None = None) -> Handle:
        """Prepares the choices, which the first dispatch exchanges; raises DeepEPError if they do not fit."""
        self._buffer.check_plan(ids_TK)
        return DeepEPHandle(len(ids_TK), label, self._lane.submit(lambda: self._prepare(ids_TK, label)))

    def dispatch(self, rows_TD: Tensor, weights_TK: Tensor, handle: Handle) -> Work[Arrived]:
        """Sends a copy of each token's row, with its weight, to each of the token's experts."""
        routing = own_handle(handle, DeepEPHandle)
        self._buffer.check_rows(rows_TD, "dispatch", may_be_codes=True)
        self._buffer.check_weights(weights_TK, "dispatch")

        def run() -> Arrived:
            received = self._lay_out(routing, rows_TD, weights_TK, "dispatch")
            assert received.weights_RK is not None
            route = routing.routes[rows_TD.dtype]
            return Arrived(route.copy_rows(received.rows), route.order.copy_weights(received.weights_RK), route.counts)

        return self._lane.submit(run)

    def dispatch_again(self, rows_TD: Tensor, handle: Handle) -> Work[Tensor]:
        """Sends a copy of each token's row to each of its experts; AD."""
        return self._send_rows("dispatch again", rows_TD, handle)

    def combine(self, rows_AD: Tensor, handle: Handle) -> Work[Tensor]:
        """Returns the unweighted sum over each token's experts, TD; rounded per rank, node and in all."""
        routing = own_handle(handle, DeepEPHandle)
        self._buffer.check_rows(rows_AD, "combine", may_be_codes=False)
        return self._lane.submit(lambda: self._to_tokens(routing, rows_AD, None, "combine")[0])

    def dispatch_backward(
        self, grad_rows_AD: Tensor, grad_weights_A: Tensor, handle: Handle
    ) -> Work[tuple[Tensor, Tensor]]:
        """Computes the gradients of rows, summed per token like `combine` (TD), and of weights (TK)."""
        routing = own_handle(handle, DeepEPHandle)
        self._buffer.check_rows(grad_rows_AD, "dispatch backward", may_be_codes=False)
        self._buffer.check_weights(grad_weights_A, "dispatch backward")

        def run() -> tuple[Tensor, Tensor]:
            grad_rows_TD, grad_weights_TK = self._to_tokens(routing, grad_rows_AD, grad_weights_A, "dispatch backward")
            assert grad_weights_TK is not None
            return grad_rows_TD, grad_weights_TK

        return self._lane.submit(run)

    def combine_backward(self, grad_rows_TD: Tensor, handle: Handle) -> Work[Tensor]:
        """Sends a copy of each token's gradient to each of its experts' rows; AD."""
        return self._send_rows("combine backward", grad_rows_TD, handle)

    def _send_rows(self, name: str, rows_TD: Tensor, handle: Handle) -> Work[Tensor]:
        routing = own_handle(handle, DeepEPHandle)
        self._buffer.check_rows(rows_TD, name, may_be_codes=True)

        def run() -> Tensor:
            if rows_TD.dtype not in routing.routes:
                rows = self._lay_out(routing, rows_TD, None, name).rows
                return routing.routes[rows_TD.dtype].copy_rows(rows)
            route = routing.routes[rows_TD.dtype]
            with self._exchanging(routing, rows_TD, name):
                rows = self._buffer.dispatch_again(rows_TD, route.handle)
            return route.copy_rows(rows)

        return self._lane.submit(run)

    def _prepare(self, ids_TK: Tensor, label: Label | None) -> _Planned:
        num_members = len(self._group.members)
        # Members and nodes that each token reaches, TM and TN; then each member's number of tokens over the cap, M 1.
        reached_TM = touched_nodes(ids_TK, self._member_of_expert_E, num_members)
        touched_TN = touched_nodes(ids_TK, self._node_of_expert_E, self._num_nodes)
        num_over_M1 = (touched_TN.sum(1) > self._max_nodes).sum().repeat(num_members, 1)
        if self._max_nodes < self._num_nodes:
            num_over_M1 = self._group.exchange_numbers(num_over_M1, label)
        numbers = torch.cat([reached_TM.sum(0), touched_TN.sum(0), num_over_M1.flatten()])
        sent_TK = ids_TK.to(self._buffer.ids_dtype).contiguous()
        return _Planned(sent_TK, touched_TN, numbers.to("cpu", non_blocking=True))

    def _lay_out(self, routing: DeepEPHandle, rows_TD: Tensor, weights_TK: Tensor | None, name: str) -> ReceivedRows:
        """Runs the first dispatch of rows of this dtype, which makes DeepEP's handle and the route."""
        planned = routing.planned()
        if rows_TD.is_cuda:
            # The plan's numbers must be on the host. DeepEP holds the GIL while it waits for the counts, so this thread
            # waits here for the work queued before them.
            torch.cuda.current_stream().synchronize()  # host sync
        routing.traffic = routing.traffic or self._complete(planned, routing.label)
        with self._exchanging(routing, rows_TD, name):
            received = self._buffer.dispatch(rows_TD, planned.ids_TK, weights_TK)
        routing.routes[rows_TD.dtype] = DeepEPRoute.of(received.handle, received.ids_RK, self._num_sources)
        return received

    def _complete(self, planned: _Planned, label: Label | None) -> _PlannedTraffic:
        """Verifies the node cap on all ranks, and predicts the rows of an exchange."""
        num_members = len(self._group.members)
        nodes = self._group.nodes
        home = self._group.nodes[self._group.index]
        numbers = planned.numbers.tolist()
        per_member = numbers[:num_members]
        per_node = numbers[num_members:-num_members]
        verify_cap(numbers[-num_members:], self._group, planned.touched_TN, self._max_nodes, label)
        layer = None if label is None else label.layer
        self._observers.traffic.add_plan(layer, len(planned.ids_TK), sum(per_node))
        crossing = sum(per_node) - per_node[sorted(set(nodes)).index(home)]
        if not self._buffer.hops_between_nodes:
            return _PlannedTraffic(Spread.of(per_member, nodes, self._group.index), crossing)
        # A row is sent to the rank with this rank's index on the other node, and forwarded from there.
        index_M = [nodes[:member].count(node) for member, node in enumerate(nodes)]
        forwarded = sum(
            rows for rows, index in zip(per_member, index_M, strict=True) if index != index_M[self._group.index]
        )
        return _PlannedTraffic(
            Spread(on_member=per_member[self._group.index], within_node=forwarded, across_nodes=crossing), crossing
        )

    def _to_tokens(
        self, routing: DeepEPHandle, rows_AD: Tensor, weights_A: Tensor | None, name: str
    ) -> tuple[Tensor, Tensor | None]:
        route = next(iter(routing.routes.values()))  # arrived rows have the same order in each
        weights_RK = None if weights_A is None else route.order.restore_weights(weights_A)
        with self._exchanging(routing, rows_AD, name):
            return self._buffer.combine(route.order.sum_rows(rows_AD), weights_RK, route.handle)

    @contextmanager
    def _exchanging(self, routing: DeepEPHandle, rows: Tensor, name: str) -> Iterator[None]:
        """Counts the predicted rows of an exchange, and logs it while inside."""
        assert routing.traffic is not None
        layer = None if routing.label is None else routing.label.layer
        num_choices = routing.planned().ids_TK.shape[1]
        bytes_per_row = rows.shape[1] * rows.itemsize + _BYTES_PER_CHOICE * num_choices
        planned = routing.traffic
        self._observers.traffic.add_predicted(layer, planned.rows, bytes_per_row, planned.min_rows_across_nodes)
        members = self._group.members
        log = self._observers.log
        with log.awaiting(log.start(group_name("deepep", members), members, name, routing.label)):
            yield
