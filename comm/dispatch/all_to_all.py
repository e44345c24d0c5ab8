"""Implements the dispatcher that sends rows to their experts' ranks with one all-to-all each way.

A plan says how many rows each rank sends to each other rank, and in which order.
"""

# Shape legend: R ranks of the expert group, T tokens of this rank, K experts per token, S copies sent, A arrived rows,
# E experts of the layer, L = E / R local experts, N nodes of the group, B bytes of a row as sent.

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from comm.dispatch.local import ExpertOrder, SortedChoices, count_choices, dense, inverse_permutation
from comm.dispatch.node_cap import nodes_of_experts, touched_nodes, verify_cap
from comm.dispatch.process_group import ExchangeGroup, Observers, RowFormat, bytes_of
from comm.dispatch.traffic import Spread, Traffic
from comm.lane import Lane
from comm.layout import Layout
from comm.protocol import Arrived, Handle, Label, Work, own_handle
from kernels.permute import permute

CountsT = TypeVar("CountsT")
RouteT = TypeVar("RouteT")


class PlannedHandle(Generic[CountsT, RouteT]):
    """Routing of one micro-batch. Owns its index tensors, which only the lane uses."""

    def __init__(self, num_tokens: int, label: Label | None, work: Work[CountsT]) -> None:
        self.label = label
        self._num_tokens = num_tokens
        self._work: Work[CountsT] | None = work
        self._route: RouteT | None = None

    @property
    def num_tokens(self) -> int:
        """Number of tokens of this rank, T."""
        return self._num_tokens

    def route(self, complete: Callable[[CountsT, Label | None], RouteT]) -> RouteT:
        """Completes the plan at first use, the only host synchronization on CUDA. Called on the lane."""
        if self._route is None:
            assert self._work is not None
            self._route = complete(self._work.wait(), self.label)
            self._work = None
        return self._route


class DispatchError(ValueError):
    """Raised if the ranks of a group cannot share the experts equally."""


def num_local_experts(num_experts: int, num_ranks: int) -> int:
    """Returns L, the experts of each rank; raises DispatchError if the ranks do not divide them."""
    if num_experts % num_ranks:
        raise DispatchError(
            f"dispatch: the expert axis must divide {num_experts} routed experts, has {num_ranks} ranks"
        )
    return num_experts // num_ranks


@dataclass(frozen=True, slots=True)
class AllToAllCounts:
    """Result of an exchange of counts, still on the device."""

    choices: SortedChoices  # sorted choices
    touched_TN: Tensor  # mask of the nodes that each token touches
    # concatenation of the dropped choices and the choices of each expert (1 + E), the tokens that touch each node (N),
    # and what each rank sent here (R (L + 1)): rows for each local expert, then its tokens over the cap.
    numbers: Tensor


@dataclass(frozen=True, slots=True)
class AllToAllRoute:
    """Splits of an exchange, on the host, and the order of arrived rows."""

    order: ExpertOrder  # order in which rows are sent
    sent: tuple[int, ...]  # rows for each rank
    received: tuple[int, ...]  # rows from each rank
    counts: tuple[int, ...]  # rows of each local expert
    min_rows_across_nodes: int  # rows that must cross nodes
    # arrival position of each row in (local expert, source rank) order; None if rows arrive in that order.
    sorted_A: Tensor | None
    arrival_A: Tensor | None  # inverse of `sorted_A`, or None


class AllToAllPlanner:
    """Planner of routes over one expert group. Used only from the comm lane."""

    def __init__(self, group: ExchangeGroup, num_experts: int, max_nodes: int | None, traffic: Traffic) -> None:
        self.num_local_experts = num_local_experts(num_experts, len(group.members))
        self._group = group
        self._num_experts = num_experts
        self._node_of_expert_E = nodes_of_experts(num_experts, group.nodes)
        self._num_nodes = len(set(group.nodes))
        self._home = sorted(set(group.nodes)).index(group.nodes[group.index])
        self._max_nodes = self._num_nodes if max_nodes is None else max_nodes
        self._traffic = traffic

    def exchange(self, ids_TK: Tensor, label: Label | None) -> AllToAllCounts:
        """Counts rows by (destination rank, local expert) and sends each rank its part."""
        self._node_of_expert_E = self._node_of_expert_E.to(ids_TK.device)
        counts = count_choices(ids_TK, self._num_experts)
        touched_TN = touched_nodes(ids_TK, self._node_of_expert_E, self._num_nodes)
        num_ranks = len(self._group.members)
        # Row r: choices of each expert of rank r, then this rank's tokens over the cap; R by L + 1.
        num_over = (touched_TN.sum(1) > self._max_nodes).sum()
        counts_RL = counts[1:].view(num_ranks, self.num_local_experts)
        pending = self._group.start_numbers(torch.cat([counts_RL, num_over.expand(num_ranks, 1)], 1), label)
        # Sorting overlaps the exchange.
        choices = SortedChoices.sort(ids_TK)
        return AllToAllCounts(choices, touched_TN, torch.cat([counts, touched_TN.sum(0), pending.wait().flatten()]))

    def complete(self, counted: AllToAllCounts, label: Label | None) -> AllToAllRoute:
        """Reads the counts, a host sync, and derives the route; raises NodeCapError on all ranks over the cap."""
        num_experts = self._num_experts
        num_local = self.num_local_experts
        num_ranks = len(self._group.members)
        numbers = counted.numbers.tolist()  # host sync
        # [dropped | rows for each expert, E | tokens that touch each node, N | from each rank, L + 1]
        counts_E = numbers[1 : 1 + num_experts]
        table = numbers[1 + num_experts + self._num_nodes :]
        rows = _rows(table, num_local + 1)
        touched_N = numbers[1 + num_experts : 1 + num_experts + self._num_nodes]
        num_over_R = [row.pop() for row in rows]
        verify_cap(num_over_R, self._group, counted.touched_TN, self._max_nodes, label)
        self._traffic.add_plan(None if label is None else label.layer, len(counted.touched_TN), sum(touched_N))
        received = tuple(map(sum, rows))
        # With one rank or one local expert, rows already arrive in expert order.
        sorted_A = None
        if num_ranks > 1 and num_local > 1:
            received_RL = counted.numbers[-len(table) :].view(num_ranks, num_local + 1)[:, :-1]
            sorted_A = _expert_major(received_RL, sum(received))
        return AllToAllRoute(
            order=counted.choices.keep(numbers[0]),
            sent=tuple(map(sum, _rows(counts_E, num_local))),
            received=received,
            counts=tuple(map(sum, zip(*rows, strict=True))),
            min_rows_across_nodes=sum(touched_N) - touched_N[self._home],
            sorted_A=sorted_A,
            arrival_A=None if sorted_A is None else inverse_permutation(sorted_A),
        )


def _rows(numbers: Sequence[int], width: int) -> list[list[int]]:
    return [list(numbers[begin : begin + width]) for begin in range(0, len(numbers), width)]


def _expert_major(received_RL: Tensor, num_arrived: int) -> Tensor:
    """Returns the arrival positions of rows in (local expert, source rank) order, from the counts."""
    # Begin of each block (source, expert) in arrival order, listed in (expert, source) order: L R.
    lengths = received_RL.flatten()
    starts_LR = (lengths.cumsum(0) - lengths).view_as(received_RL).T.flatten()
    # Each row moves by the difference between its block's begin in arrival order and in sorted order: L R, then A.
    lengths_LR = received_RL.T.flatten()
    shifts_LR = starts_LR - (lengths_LR.cumsum(0) - lengths_LR)
    places = torch.arange(num_arrived, device=received_RL.device)
    return places + shifts_LR.repeat_interleave(lengths_LR, output_size=num_arrived)


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
        routing = own_handle(handle, AllToAllHandle)

        def run() -> Arrived:
            route = routing.route(self._planner.complete)
            # Pack each copy with its weight, sorted by expert: SB.
            weights_S1 = route.order.copy_weights(weights_TK)[:, None]
            form = RowFormat.of(rows_TD, weights_S1)
            bytes_SB = form.allocate(len(weights_S1), rows_TD.device)
            route.order.copy_rows(rows_TD, form.part(bytes_SB, 0))
            form.part(bytes_SB, 1).copy_(weights_S1)
            # Arrived rows, AB, then sorted by local expert.
            bytes_AB = self._exchange("dispatch", routing, form, bytes_SB)
            rows_AD = _reorder(form.part(bytes_AB, 0), route.sorted_A)
            weights_A1 = _reorder(form.part(bytes_AB, 1), route.sorted_A)
            return Arrived(rows_AD, weights_A1.view(-1), route.counts)

        return self._lane.submit(run)

    def dispatch_again(self, rows_TD: Tensor, handle: Handle) -> Work[Tensor]:
        """Sends a copy of each token's row to each of its experts; AD."""
        return self._send_rows("dispatch again", rows_TD, handle)

    def combine(self, rows_AD: Tensor, handle: Handle) -> Work[Tensor]:
        """Returns the unweighted sum over each token's experts, in the order of its choices; TD."""
        routing = own_handle(handle, AllToAllHandle)

        def run() -> Tensor:
            route = routing.route(self._planner.complete)
            form = RowFormat.of(rows_AD)
            bytes_SB = self._exchange("combine", routing, form, bytes_of(_reorder(rows_AD, route.arrival_A)), back=True)
            return route.order.sum_rows(form.part(bytes_SB, 0))

        return self._lane.submit(run)

    def dispatch_backward(
        self, grad_rows_AD: Tensor, grad_weights_A: Tensor, handle: Handle
    ) -> Work[tuple[Tensor, Tensor]]:
        """Computes the gradients of rows, summed per token (TD), and of weights (TK)."""
        routing = own_handle(handle, AllToAllHandle)

        def run() -> tuple[Tensor, Tensor]:
            route = routing.route(self._planner.complete)
            form = RowFormat.of(grad_rows_AD, grad_weights_A[:, None])
            bytes_AB = form.allocate(len(grad_rows_AD), grad_rows_AD.device)
            _reorder(grad_rows_AD, route.arrival_A, form.part(bytes_AB, 0))
            _reorder(grad_weights_A[:, None], route.arrival_A, form.part(bytes_AB, 1))
            bytes_SB = self._exchange("dispatch backward", routing, form, bytes_AB, back=True)
            grad_weights_TK = route.order.restore_weights(form.part(bytes_SB, 1).reshape(-1))
            return route.order.sum_rows(form.part(bytes_SB, 0)), grad_weights_TK

        return self._lane.submit(run)

    def combine_backward(self, grad_rows_TD: Tensor, handle: Handle) -> Work[Tensor]:
        """Sends a copy of each token's gradient to each of its experts' rows; AD."""
        return self._send_rows("combine backward", grad_rows_TD, handle)

    def close(self) -> None:
        """Does nothing: there is nothing to free."""

    def _send_rows(self, name: str, rows_TD: Tensor, handle: Handle) -> Work[Tensor]:
        routing = own_handle(handle, AllToAllHandle)

        def run() -> Tensor:
            route = routing.route(self._planner.complete)
            form = RowFormat.of(rows_TD)
            bytes_AB = self._exchange(name, routing, form, bytes_of(route.order.copy_rows(rows_TD)))
            return _reorder(form.part(bytes_AB, 0), route.sorted_A)

        return self._lane.submit(run)

    def _exchange(
        self, name: str, routing: AllToAllHandle, form: RowFormat, bytes_NB: Tensor, *, back: bool = False
    ) -> Tensor:
        """Sends copies of tokens to their experts' ranks, or back to their tokens' ranks."""
        route = routing.route(self._planner.complete)
        sent, received = (route.received, route.sent) if back else (route.sent, route.received)
        group = self._group
        layer = None if routing.label is None else routing.label.layer
        spread = Spread.of(sent, group.nodes, group.index)
        self._traffic.add_predicted(layer, spread, form.bytes_per_row, route.min_rows_across_nodes)
        return group.start(bytes_NB, sent, received, name, routing.label).wait()


def _reorder(rows_ND: Tensor, source_N: Tensor | None, out_ND: Tensor | None = None) -> Tensor:
    """Gathers rows by index into a contiguous result, `out_ND` if given; None keeps their order."""
    if source_N is not None:
        return permute(dense(rows_ND), source_N, out_ND)
    return rows_ND.contiguous() if out_ND is None else out_ND.copy_(rows_ND)
