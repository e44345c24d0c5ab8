"""Implements the dispatcher that sends a row once to each node of its experts, then to the experts.

A row is sent to its relay, the rank with the same index on the other node, which forwards it within the node. In the
opposite direction each node sends one partial sum (arXiv:2412.19437, section 3.2.2). The micro-batch is sent in chunks:
one crosses nodes while the previous one is forwarded within the node. Messages are numbered: 0 to C - 1 are chunks that
cross nodes, C contains the rows that stay on their node.
"""

# Shape legend: A rows of this rank's experts, X rows that arrive at this rank (one for all of its experts), P partial
# sums of a token, M rows of a message, S rows that a relay forwards, Y rows that return to this rank, B bytes of a row
# as sent, C chunks.

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from comm.config import TwoHopDispatchConfig
from comm.dispatch.all_to_all import PlannedHandle, num_local_experts
from comm.dispatch.local import ExpertOrder, dense, restore_values
from comm.dispatch.process_group import ExchangeGroup, Observers, RowFormat, RowPart
from comm.dispatch.traffic import Spread, Traffic
from comm.dispatch.two_hop.plan import CountLayout, Hop, RelayOrder, RowRouter, TwoHopCounts, TwoHopPlanner, TwoHopRoute
from comm.groups import GroupKernels, join_one, open_communicators
from comm.lane import Lane
from comm.layout import Layout, Relays, node_partition, rail_partition
from comm.protocol import Arrived, Handle, Label, Work, own_handle
from kernels.permute import permute, unpermute

_ROWS, _WEIGHTS, _IDS = range(3)  # parts of a dispatched row


@dataclass(frozen=True, slots=True)
class TwoHopGroups:
    """Process groups of one rank, used only by one lane."""

    expert: ProcessGroup  # the expert group
    rail: ProcessGroup  # ranks of the expert group between which this rank's rows cross nodes
    node: ProcessGroup  # ranks of the expert group on this rank's node

    @classmethod
    def join(cls, expert: ProcessGroup, layout: Layout, timeout_seconds: float, kernels: GroupKernels) -> Self:
        """Creates the rail and node groups. Every rank of the job calls it at the same point."""
        rail = join_one(rail_partition(layout), timeout_seconds, kernels)
        node = join_one(node_partition(layout), timeout_seconds, kernels)
        open_communicators([rail, node])
        return cls(expert, rail, node)

    def close(self) -> None:
        """Destroys the groups that `join` created. All ranks call it at the same point."""
        for group in (self.rail, self.node):
            distributed.destroy_process_group(group)


class TwoHopHandle(PlannedHandle[TwoHopCounts, TwoHopRoute]):
    """Handle of a `TwoHopDispatcher`; its first dispatch sends expert ids and keeps their order."""

    def __init__(self, num_tokens: int, label: Label | None, work: Work[TwoHopCounts]) -> None:
        super().__init__(num_tokens, label, work)
        self.relay_orders: list[RelayOrder] = []
        self._expansion: ExpertOrder | None = None

    def expand(self, make: Callable[[], ExpertOrder]) -> ExpertOrder:
        """Returns the order of the experts' rows; the first dispatch makes it."""
        if self._expansion is None:
            self._expansion = make()
        return self._expansion

    @property
    def expansion(self) -> ExpertOrder:
        """Order of the experts' rows; available after the first dispatch."""
        assert self._expansion is not None, "the first exchange of a plan must be a dispatch"
        return self._expansion


class TwoHopDispatcher:
    """Dispatcher over an expert group with two hops. Member i holds experts i*L to (i+1)*L - 1.

    Rows of one local expert arrive by source rank, then by token, for any timing and number of chunks. Every rank sums
    in one fixed order. Wrappers implement `payload` and clipping. Every member of the group builds one.
    """

    def __init__(
        self,
        groups: TwoHopGroups,
        num_experts: int,
        layout: Layout,
        lane: Lane,
        observers: Observers,
        config: TwoHopDispatchConfig,
    ) -> None:
        expert = ExchangeGroup("expert", groups.expert, layout, observers)
        self._rail = ExchangeGroup("rail", groups.rail, layout, observers)
        self._node = ExchangeGroup("node", groups.node, layout, observers)
        self.num_local_experts = num_local_experts(num_experts, len(expert.members))
        relays = Relays(expert.nodes)
        rail = [expert.members.index(rank) for rank in self._rail.members]
        count_layout = CountLayout(relays, expert.index, rail, self.num_local_experts, config.chunks)
        max_nodes = config.max_nodes if config.node_cap == "verify" else None
        self._planner = TwoHopPlanner(expert, relays, count_layout, num_experts, max_nodes, observers.traffic)
        members = relays.members_of[relays.node_of[expert.index]]
        self._router = RowRouter(num_experts, self.num_local_experts, members, expert.index)
        self._groups = groups
        self._lane = lane
        self._traffic = observers.traffic
        self._partial_sums = config.partial_sums

    def plan(self, ids_TK: Tensor, weights_TK: Tensor | None = None, label: Label | None = None) -> Handle:
        """Starts the exchange of counts on the lane; over the cap, first use raises NodeCapError on all ranks."""
        work = self._lane.submit(lambda: self._planner.exchange(ids_TK, label))
        return TwoHopHandle(ids_TK.shape[0], label, work)

    def dispatch(self, rows_TD: Tensor, weights_TK: Tensor, handle: Handle) -> Work[Arrived]:
        """Sends a copy of each token's row, with its weight, to each of the token's experts."""
        routing = own_handle(handle, TwoHopHandle)

        def run() -> Arrived:
            route = routing.route(self._planner.complete)
            # The ids are sent with the rows: relays and experts' ranks derive their order from them.
            form = RowFormat.of(rows_TD, weights_TK, route.shifted_TK)
            arrived_XB = self._send_to_experts("dispatch", routing, form, (rows_TD, weights_TK, route.shifted_TK))
            expansion = routing.expand(lambda: self._expand(route, form.part(arrived_XB, _IDS)))
            weights_A = expansion.copy_weights(form.part(arrived_XB, _WEIGHTS))
            return Arrived(expansion.copy_rows(form.part(arrived_XB, _ROWS)), weights_A, route.counts.counts)

        return self._lane.submit(run)

    def dispatch_again(self, rows_TD: Tensor, handle: Handle) -> Work[Tensor]:
        """Sends a copy of each token's row to each of its experts, without ids; AD."""
        return self._send_rows("dispatch again", rows_TD, handle)

    def combine(self, rows_AD: Tensor, handle: Handle) -> Work[Tensor]:
        """Returns the unweighted sum over each token's experts; TD."""
        routing = own_handle(handle, TwoHopHandle)
        return self._lane.submit(lambda: self._return_to_tokens("combine", routing, rows_AD, None)[0])

    def dispatch_backward(
        self, grad_rows_AD: Tensor, grad_weights_A: Tensor, handle: Handle
    ) -> Work[tuple[Tensor, Tensor]]:
        """Computes the gradients of rows, summed per token (TD), and of weights (TK)."""
        routing = own_handle(handle, TwoHopHandle)

        def run() -> tuple[Tensor, Tensor]:
            grad_rows_TD, grad_weights_TK = self._return_to_tokens(
                "dispatch backward", routing, grad_rows_AD, grad_weights_A
            )
            return grad_rows_TD, grad_weights_TK

        return self._lane.submit(run)

    def combine_backward(self, grad_rows_TD: Tensor, handle: Handle) -> Work[Tensor]:
        """Sends a copy of each token's gradient to each of its experts' rows; AD."""
        return self._send_rows("combine backward", grad_rows_TD, handle)

    def close(self) -> None:
        """Destroys the rail and node groups."""
        self._groups.close()

    def _send_rows(self, name: str, rows_TD: Tensor, handle: Handle) -> Work[Tensor]:
        routing = own_handle(handle, TwoHopHandle)

        def run() -> Tensor:
            form = RowFormat.of(rows_TD)
            arrived_XB = self._send_to_experts(name, routing, form, (rows_TD,))
            return routing.expansion.copy_rows(form.part(arrived_XB, _ROWS))

        return self._lane.submit(run)

    def _send_to_experts(self, name: str, routing: TwoHopHandle, form: RowFormat, parts: Sequence[Tensor]) -> Tensor:
        """Sends rows to their experts' ranks, once to each; bytes_XB. The first exchange must include the ids."""
        route = routing.route(self._planner.complete)
        dense_parts = [dense(part) for part in parts]

        def relay(chunk: int, crossed_MB: Tensor) -> Tensor:
            if len(routing.relay_orders) == chunk:
                num_sent = sum(route.counts.within[chunk].sent)
                routing.relay_orders.append(self._router.relay(form.part(crossed_MB, _IDS), num_sent))
            return permute(crossed_MB, routing.relay_orders[chunk].rows_S)

        exchange = self._chunked(name, routing)
        exchange.predict(self._traffic, form.bytes_per_row, route.counts.min_rows_across_nodes, back=False)
        return exchange.send_to_experts(form, lambda message: form.gather(dense_parts, route.tokens[message]), relay)

    def _return_to_tokens(
        self, name: str, routing: TwoHopHandle, rows_AD: Tensor, weights_A: Tensor | None
    ) -> list[Tensor]:
        """Returns rows to their tokens with a partial sum at each hop; TD. With weights, also those; TK."""
        route = routing.route(self._planner.complete)
        rows = dense(rows_AD)
        dtype = torch.float32 if self._partial_sums == "float32" and rows_AD.itemsize < 4 else rows_AD.dtype
        # Positions of each arriving row's copies among the experts' rows, by message.
        places = routing.expansion.places_TK.split([sum(hop.received) for hop in route.counts.within])
        extras = () if weights_A is None else (RowPart(route.shifted_TK.shape[1], weights_A.dtype),)
        form = RowFormat.of_parts(RowPart(rows.shape[1], dtype), *extras)

        def pack(message: int) -> Tensor:
            # Partial sums over this rank's experts.
            sums = [unpermute(rows, places[message], dtype)]
            if weights_A is not None:
                sums.append(restore_values(weights_A, places[message]))
            return form.pack(sums)

        def relay(chunk: int, crossed_MB: Tensor) -> Tensor:
            # Partial sums over the node's ranks.
            return form.pack(form.sum(crossed_MB, routing.relay_orders[chunk].places_MG))

        exchange = self._chunked(name, routing)
        exchange.predict(self._traffic, form.bytes_per_row, route.counts.min_rows_across_nodes, back=True)
        returned_YB = exchange.return_to_tokens(form, pack, relay)
        return form.sum(returned_YB, route.places_TP, rows_AD.dtype)

    def _chunked(self, name: str, routing: TwoHopHandle) -> "ChunkedExchange":
        counts = routing.route(self._planner.complete).counts
        return ChunkedExchange(self._rail, self._node, counts.across, counts.within, name, routing.label)

    def _expand(self, route: TwoHopRoute, shifted_XK: Tensor) -> ExpertOrder:
        return self._router.expand(shifted_XK, route.by_source_X, sum(route.counts.counts))


Pack = Callable[[int], Tensor]  # returns the bytes of the message with a number

Relay = Callable[[int, Tensor], Tensor]
"""Returns the bytes that a relay forwards, from the number of a message and its received bytes."""


class ChunkedExchange:
    """Exchange over both hops. All ranks of the group start the same messages in order, even empty ones."""

    def __init__(
        self,
        rail: ExchangeGroup,
        node: ExchangeGroup,
        across: Sequence[Hop],
        within: Sequence[Hop],
        name: str,
        label: Label | None,
    ) -> None:
        self._rail = rail
        self._node = node
        self._across = across
        self._within = within
        self._name = name
        self._label = label

    def send_to_experts(self, form: RowFormat, pack: Pack, relay: Relay) -> Tensor:
        """Sends rows to their experts' ranks and returns bytes_XB, ordered by message."""
        num_chunks = len(self._across)
        # All chunks start to cross nodes at once; the rows that stay on the node are sent meanwhile.
        crossings = [self._start_across(chunk, pack(chunk), hop, None) for chunk, hop in enumerate(self._across)]
        home = pack(num_chunks)
        lengths = [sum(hop.received) for hop in self._within]
        arrived_XB = form.allocate(sum(lengths), home.device)
        into = arrived_XB.split(lengths)
        pending = self._start_within(num_chunks, home, self._within[-1], into[-1])
        del home
        # Forward each chunk within the node when it has crossed, while the next ones cross.
        for chunk in range(num_chunks):
            crossed = crossings.pop(0).wait()
            following = self._start_within(chunk, relay(chunk, crossed), self._within[chunk], into[chunk])
            del crossed
            pending.wait()
            pending = following
        pending.wait()
        return arrived_XB

    def return_to_tokens(self, form: RowFormat, pack: Pack, relay: Relay) -> Tensor:
        """Sends rows back to their tokens' ranks, the next chunk while a relay sums one; bytes_YB by message."""
        first = pack(0)
        lengths = [sum(hop.sent) for hop in (*self._across, self._within[-1])]
        returned_YB = form.allocate(sum(lengths), first.device)
        into = returned_YB.split(lengths)
        pending = self._return_within(0, first, into)
        del first
        crossings = []
        for chunk, hop in enumerate(self._across):
            following = self._return_within(chunk + 1, pack(chunk + 1), into)
            crossings.append(self._start_across(chunk, relay(chunk, pending.wait()), hop.back, into[chunk]))
            pending = following
        for exchange in (pending, *crossings):
            exchange.wait()
        return returned_YB

    def predict(self, traffic: Traffic, bytes_per_row: int, min_rows_across_nodes: int, *, back: bool) -> None:
        """Counts the rows that the plan predicts for the direction to experts or, with `back`, to tokens."""
        layer = None if self._label is None else self._label.layer
        for group, hops, least in ((self._rail, self._across, min_rows_across_nodes), (self._node, self._within, 0)):
            sent = [hop.back.sent if back else hop.sent for hop in hops] or [(0,) * len(group.members)]
            rows = Spread.of(list(map(sum, zip(*sent, strict=True))), group.nodes, group.index)
            traffic.add_predicted(layer, rows, bytes_per_row, least)

    def _return_within(self, message: int, bytes_NB: Tensor, into: Sequence[Tensor]) -> Work[Tensor]:
        """Starts to return rows within the node: a chunk's to the relay, others to their tokens' ranks."""
        is_home = message == len(self._across)
        return self._start_within(message, bytes_NB, self._within[message].back, into[message] if is_home else None)

    def _start_within(self, message: int, bytes_NB: Tensor, hop: Hop, into_MB: Tensor | None) -> Work[Tensor]:
        part = "local rows" if message == len(self._across) else f"chunk {message}"
        name = f"{self._name} within the node, {part}"
        return self._node.start(bytes_NB, hop.sent, hop.received, name, self._label, into_MB)

    def _start_across(self, chunk: int, bytes_NB: Tensor, hop: Hop, into_MB: Tensor | None) -> Work[Tensor]:
        name = f"{self._name} across nodes, chunk {chunk}"
        return self._rail.start(bytes_NB, hop.sent, hop.received, name, self._label, into_MB)
