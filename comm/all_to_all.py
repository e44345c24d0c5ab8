"""The dispatcher that sends each copy of a token straight to its expert's rank, one all-to-all each way.

Shape legend: R ranks of the expert group, T tokens of this rank, K experts per token, N = T K copies sent,
A arrived rows, D hidden size, E experts of the layer, L = E / R local experts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from comm.expert_order import ExpertOrder, inverse_permutation
from comm.lane import Lane
from comm.layout import Layout
from comm.protocol import Arrived, Handle, Work
from comm.traffic import Traffic


class DispatchError(ValueError):
    """Experts that the ranks of a group cannot share."""


@dataclass(frozen=True, slots=True)
class _Exchanged:
    """What `plan` leaves behind, still on the device: its own order, and counts as (received RL, sent R, touched 1)."""

    order: ExpertOrder
    numbers: Tensor


@dataclass(frozen=True, slots=True)
class _Route:
    """What a transfer needs, on the host: rows to and from each rank, and how arrived rows are sorted.

    sorted_A: the arrival place of each row in (local expert, source rank) order; arrival_A: its inverse. Both
    are None where arrival order is expert order already.
    """

    order: ExpertOrder
    sent: list[int]
    received: list[int]
    counts: tuple[int, ...]
    sorted_A: Tensor | None
    arrival_A: Tensor | None


class AllToAllHandle:
    """One routing of one micro-batch. Owns its index tensors, which only the lane touches."""

    def __init__(self, num_tokens: int, work: Work[_Exchanged]) -> None:
        self._num_tokens = num_tokens
        self._work: Work[_Exchanged] | None = work
        self._route: _Route | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of this rank, T."""
        return self._num_tokens

    def route(self, dispatcher: "AllToAllDispatcher") -> _Route:
        """Completes the plan at first use, which is the only host synchronisation on CUDA. Called on the lane."""
        if self._route is None:
            assert self._work is not None
            self._route = dispatcher.complete(self._work.wait())
            self._work = None
        return self._route


class AllToAllDispatcher:
    """`comm.protocol.Dispatcher` over an expert group; the member at place i holds experts i*L to (i+1)*L - 1.

    Rows of one local expert arrive by source rank, then by token, whatever the timing.
    """

    def __init__(
        self, group: ProcessGroup, num_experts: int, layout: Layout, lane: Lane, traffic: Traffic | None
    ) -> None:
        """Every member makes its own.

        Args:
            group: of the ranks that share a layer's experts; used by this lane alone.
            num_experts: of the layer, over all ranks.
            layout: tells the members' nodes, for `traffic`.
            lane: where all exchanges run.
            traffic: counts what is sent, if given.

        Raises:
            DispatchError: the group does not divide the experts.
        """
        members = distributed.get_process_group_ranks(group)
        if num_experts % len(members):
            raise DispatchError(
                f"dispatch: the expert axis must divide {num_experts} routed experts, got {len(members)} ranks"
            )
        self.num_local_experts = num_experts // len(members)
        self._group = group
        self._num_experts = num_experts
        self._nodes = [layout.node_of(rank) for rank in members]
        self._place = distributed.get_rank(group)
        self._lane = lane
        self._traffic = traffic

    def plan(self, topk_ids_TK: Tensor) -> Handle:
        """Starts the exchange of counts per (destination rank, local expert) on the lane."""
        return AllToAllHandle(topk_ids_TK.shape[0], self._lane.submit(lambda: self._exchange_counts(topk_ids_TK)))

    def dispatch(self, rows_TD: Tensor, weights_TK: Tensor, handle: Handle) -> Work[Arrived]:
        """A copy of each token's row, and the weight, to each of its experts."""
        own = _own(handle)

        def run() -> Arrived:
            route = own.route(self)
            sent = [route.order.copy_rows(rows_TD), route.order.copy_weights(weights_TK)]
            rows_AD, weights_A = self._to_experts(route, sent)
            return Arrived(rows_AD, weights_A, route.counts)

        return self._lane.submit(run)

    def combine(self, rows_AD: Tensor, handle: Handle) -> Work[Tensor]:
        """The unweighted sum over each token's experts, in the order of its choices; TD."""
        own = _own(handle)

        def run() -> Tensor:
            route = own.route(self)
            (rows_ND,) = self._to_tokens(route, [rows_AD])
            return route.order.sum_rows(rows_ND)

        return self._lane.submit(run)

    def dispatch_backward(self, rows_AD: Tensor, weights_A: Tensor, handle: Handle) -> Work[tuple[Tensor, Tensor]]:
        """Gradients of rows, summed per token (TD), and of weights (TK)."""
        own = _own(handle)

        def run() -> tuple[Tensor, Tensor]:
            route = own.route(self)
            rows_ND, weights_N = self._to_tokens(route, [rows_AD, weights_A])
            return route.order.sum_rows(rows_ND), route.order.restore_weights(weights_N)

        return self._lane.submit(run)

    def combine_backward(self, rows_TD: Tensor, handle: Handle) -> Work[Tensor]:
        """A copy of each token's gradient to each of its experts' rows; AD."""
        own = _own(handle)

        def run() -> Tensor:
            route = own.route(self)
            return self._to_experts(route, [route.order.copy_rows(rows_TD)])[0]

        return self._lane.submit(run)

    def complete(self, exchanged: _Exchanged) -> _Route:
        """Reads the exchanged counts and derives splits and orders. Called on the lane by a handle."""
        num_ranks, num_local = len(self._nodes), self.num_local_experts
        numbers = exchanged.numbers.tolist()
        received = [numbers[source * num_local : (source + 1) * num_local] for source in range(num_ranks)]
        sent = numbers[num_ranks * num_local : -1]
        if self._traffic is not None:
            self._traffic.add_tokens(exchanged.order.shape_TK[0], numbers[-1])
        num_arrived = sum(map(sum, received))
        sorted_A = None
        if num_ranks > 1 and num_local > 1:
            received_RL = exchanged.numbers[: num_ranks * num_local].view(num_ranks, num_local)
            sorted_A = _expert_major(received_RL, num_arrived)
        return _Route(
            order=exchanged.order,
            sent=sent,
            received=[sum(row) for row in received],
            counts=tuple(map(sum, zip(*received, strict=True))),
            sorted_A=sorted_A,
            arrival_A=None if sorted_A is None else inverse_permutation(sorted_A),
        )

    def _exchange_counts(self, topk_ids_TK: Tensor) -> _Exchanged:
        order = ExpertOrder.sort(topk_ids_TK, self._num_experts)
        received_RL = torch.empty_like(order.counts_E)
        distributed.all_to_all_single(received_RL, order.counts_E, group=self._group)
        sent_R = order.counts_E.view(len(self._nodes), self.num_local_experts).sum(1)
        return _Exchanged(order, torch.cat([received_RL, sent_R, self._count_touched_nodes(topk_ids_TK)]))

    def _count_touched_nodes(self, topk_ids_TK: Tensor) -> Tensor:
        if self._traffic is None:
            return topk_ids_TK.new_zeros(1)
        first = min(self._nodes)
        nodes_R = torch.tensor(self._nodes, device=topk_ids_TK.device) - first
        touched_TK = nodes_R[topk_ids_TK // self.num_local_experts]
        touched = torch.zeros(
            len(topk_ids_TK), max(self._nodes) - first + 1, dtype=torch.bool, device=topk_ids_TK.device
        )
        return touched.scatter_(1, touched_TK, True).sum().view(1)

    def _to_experts(self, route: _Route, copies: list[Tensor]) -> list[Tensor]:
        arrived = self._send(copies, route.sent, route.received)
        return arrived if route.sorted_A is None else [part.index_select(0, route.sorted_A) for part in arrived]

    def _to_tokens(self, route: _Route, parts: list[Tensor]) -> list[Tensor]:
        back = parts if route.arrival_A is None else [part.index_select(0, route.arrival_A) for part in parts]
        return self._send(back, route.received, route.sent)

    def _send(self, parts: Sequence[Tensor], sent: list[int], received: list[int]) -> list[Tensor]:
        """Sends every part of each row under way at once; parts keep their dtypes, as bytes, which gloo needs."""
        assert all(len(part) == sum(sent) for part in parts)
        results = [part.new_empty((sum(received), *part.shape[1:])) for part in parts]
        buffers = [(_as_bytes(result), _as_bytes(part)) for result, part in zip(results, parts, strict=True)]
        works = [
            distributed.all_to_all_single(into, out, received, sent, group=self._group, async_op=True)
            for into, out in buffers
        ]
        for work in works:
            assert work is not None
            work.wait()
        if self._traffic is not None:
            self._traffic.add_rows(sent, self._nodes, self._place, sum(out.shape[1] for _, out in buffers))
        return results


def _own(handle: Handle) -> AllToAllHandle:
    assert isinstance(handle, AllToAllHandle)
    return handle


def _as_bytes(rows: Tensor) -> Tensor:
    return rows.reshape(len(rows), math.prod(rows.shape[1:])).contiguous().view(torch.uint8)


def _expert_major(received_RL: Tensor, num_arrived: int) -> Tensor:
    """The arrival places of rows in (local expert, source rank) order, from counts in (source, local expert) order."""
    lengths = received_RL.flatten()
    starts_LR = (lengths.cumsum(0) - lengths).view_as(received_RL).T.flatten()
    lengths_LR = received_RL.T.flatten()
    shifts_LR = starts_LR - (lengths_LR.cumsum(0) - lengths_LR)
    places = torch.arange(num_arrived, device=received_RL.device)
    return places + shifts_LR.repeat_interleave(lengths_LR, output_size=num_arrived)
