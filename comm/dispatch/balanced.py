"""Sends rows of hot experts to copies of them on other ranks, which differ for every micro-batch.

The inner dispatcher sees slots instead of experts: each rank has one for each of its experts, and some for copies. All
ranks know all counts, compute the same plan, and send the weights of copies to their slots. Gradients of copies return
to the expert's rank, which sums them in a fixed order.
"""

# Shape legend: R ranks of the group, E experts of a layer, L = E / R experts of each rank, S slots of a rank for
# copies, C most copies of an expert, T tokens, K choices of a token, N = T K, B bytes of a copy's part.

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from comm.balance.rows import Ints, RowPlan
from comm.dispatch.all_to_all import num_local_experts
from comm.dispatch.local import count_choices
from comm.dispatch.node_cap import nodes_of_experts, touched_nodes
from comm.dispatch.process_group import ExchangeGroup, bytes_of
from comm.dispatch.traffic import Spread, Traffic
from comm.lane import Lane
from comm.protocol import Arrived, Dispatcher, Handle, Label, Work, own_handle

PlanRows = Callable[[Ints], RowPlan]
"""Plans copies from the counts of each source rank, RE; the same on all ranks."""


@dataclass(frozen=True, order=True, slots=True)
class _Copy:
    home: int  # index of the rank of the expert itself
    rank: int  # index of the rank of the copy
    expert: int
    slot: int  # slot in the plan


@dataclass(frozen=True, slots=True)
class CopyRound:
    """Copies that one exchange carries. Those that arrive fill the next free slots."""

    experts: tuple[int, ...]  # local expert of each copy that this rank sends, by member
    sent: tuple[int, ...]  # copies for each member
    received: tuple[int, ...]  # copies from each member


@dataclass(frozen=True, slots=True)
class CopyRoute:
    """Exchanges of copies, and the slots for the choices of this rank's tokens."""

    rounds: tuple[CopyRound, ...]
    bounds_EC: Tensor  # end of the choices that each copy of an expert takes, among those of this rank
    slots_EC: Tensor  # slot of each copy of an expert; the last column is the slot of the expert itself


class SlotLayout:
    """Slots of all ranks of a group: L of a rank for its own experts, then S for copies."""

    def __init__(self, num_experts: int, nodes: Sequence[int], num_slots: int, max_nodes: int | None) -> None:
        """Stores the arguments; `max_nodes` is None if all copies are on the node of their expert."""
        num_ranks = len(nodes)
        self.num_ranks = num_ranks
        self.num_local = num_local_experts(num_experts, num_ranks)
        self.num_slots = num_slots
        self.max_nodes = max_nodes
        self.per_rank = self.num_local + num_slots
        self.num_all = num_ranks * self.per_rank
        experts_E = torch.arange(num_experts)
        self.home_E = experts_E // self.num_local * self.per_rank + experts_E % self.num_local
        self.num_nodes = len(set(nodes))
        self.node_of_slot = nodes_of_experts(self.num_all, nodes)

    def route(self, plan: RowPlan, index: int) -> CopyRoute:
        """Returns what a plan means for one member: its exchanges of copies and the slots of its choices."""
        copies = sorted(
            _Copy(expert // self.num_local, rank, expert, slot)
            for rank, experts in enumerate(plan.slot_expert_RS)
            for slot, expert in enumerate(experts)
            if expert >= 0
        )
        # In each exchange a rank sends at most S copies, so that those of a hot expert need no more memory.
        rounds: dict[int, list[_Copy]] = {}
        num_sent = [0] * self.num_ranks
        for copy in copies:
            rounds.setdefault(num_sent[copy.home] // self.num_slots, []).append(copy)
            num_sent[copy.home] += 1
        # Copies fill a rank's slots as they arrive: by exchange, then by sender.
        places: dict[int, list[tuple[int, int]]] = {}
        num_arrived = [0] * self.num_ranks
        in_order = [round_copies for _, round_copies in sorted(rounds.items())]
        for round_copies in in_order:
            for copy in round_copies:
                slot = copy.rank * self.per_rank + self.num_local + num_arrived[copy.rank]
                num_arrived[copy.rank] += 1
                places.setdefault(copy.expert, []).append((slot, int(plan.rows_RSR[copy.rank, copy.slot, index])))
        most = max(map(len, places.values()), default=0)
        bounds_EC = torch.zeros(len(self.home_E), most, dtype=torch.int64)
        slots_EC = self.home_E[:, None].repeat(1, most + 1)
        for expert, parts in places.items():
            rows_C = torch.tensor([rows for _, rows in parts] + [0] * (most - len(parts)))
            bounds_EC[expert] = rows_C.cumsum(0)
            slots_EC[expert, : len(parts)] = torch.tensor([slot for slot, _ in parts])
        return CopyRoute(tuple(self._round(round_copies, index) for round_copies in in_order), bounds_EC, slots_EC)

    def choose(self, ids_TK: Tensor, route: CopyRoute) -> Tensor:
        """Returns a slot for each choice, TK: the first choices of an expert go to its first copy, and so on.

        A token that would touch more than the most nodes goes to no copy on another node than the expert's.
        """
        device = ids_TK.device
        slots_EC = route.slots_EC.to(device)
        ids_N = ids_TK.flatten()
        valid_N = ids_N.clamp(min=0)
        # Number of each choice among those of its expert, in the order of tokens.
        counts = count_choices(ids_TK, len(self.home_E))
        begins = counts.cumsum(0) - counts
        order_N = ids_N.argsort(stable=True)
        numbers_N = torch.empty_like(ids_N)
        numbers_N[order_N] = torch.arange(len(ids_N), device=device) - begins[ids_N[order_N] + 1]
        # Copies that are full take no more; behind the last column is the expert itself.
        copies_N = (numbers_N[:, None] >= route.bounds_EC.to(device)[valid_N]).sum(1)
        slots_TK = slots_EC[valid_N, copies_N].masked_fill(ids_N < 0, -1).view_as(ids_TK)
        if self.max_nodes is None or not route.rounds:
            return slots_TK
        node_of_slot = self.node_of_slot.to(device)
        home_TK = slots_EC[valid_N, -1].masked_fill(ids_N < 0, -1).view_as(ids_TK)
        over_T = touched_nodes(slots_TK, node_of_slot, self.num_nodes).sum(1) > self.max_nodes
        is_away_TK = node_of_slot[slots_TK] != node_of_slot[home_TK]
        return torch.where(over_T[:, None] & is_away_TK, home_TK, slots_TK)

    def _round(self, copies: Sequence[_Copy], index: int) -> CopyRound:
        members = range(self.num_ranks)
        sent = [copy for copy in copies if copy.home == index]
        received = [copy for copy in copies if copy.rank == index]
        return CopyRound(
            experts=tuple(copy.expert % self.num_local for copy in sent),
            sent=tuple(sum(copy.rank == member for copy in sent) for member in members),
            received=tuple(sum(copy.home == member for copy in received) for member in members),
        )


class BalancedHandle:
    """Routing of one micro-batch to slots. The lane plans the copies before any exchange of rows."""

    inner: Handle
    planned: Work[None]
    route: CopyRoute  # set on the lane

    def __init__(self, num_tokens: int, label: Label | None) -> None:
        self.num_tokens = num_tokens  # tokens of this rank, T
        self.label = label


class BalancedDispatcher:
    """Wrapper of a dispatcher of slots that plans copies of experts for every micro-batch.

    `Arrived.counts` has the rows of this rank's experts, then of its S slots for copies, whose weights `copy_weights`
    sends. A plan without copies costs one exchange of counts.
    """

    def __init__(
        self,
        inner: Dispatcher,
        group: ExchangeGroup,
        layout: SlotLayout,
        plan_rows: PlanRows,
        lane: Lane,
        traffic: Traffic,
    ) -> None:
        """Stores the arguments; `inner` was built for the slots of `layout`."""
        self.num_local_experts = layout.num_local
        self.num_slots = layout.num_slots
        self._inner = inner
        self._group = group
        self._layout = layout
        self._plan_rows = plan_rows
        self._lane = lane
        self._traffic = traffic

    def plan(self, ids_TK: Tensor, weights_TK: Tensor | None = None, label: Label | None = None) -> Handle:
        """Exchanges the counts of all ranks, plans copies, and plans the exchange of rows to slots."""
        handle = BalancedHandle(ids_TK.shape[0], label)
        slots_TK = torch.empty_like(ids_TK)

        def run() -> None:
            counts_E = count_choices(ids_TK, len(self._layout.home_E))[1:]
            counts_RE = self._group.exchange_numbers(counts_E.repeat(self._layout.num_ranks, 1), label)
            plan = self._plan_rows(counts_RE.cpu().numpy())  # host sync
            handle.route = self._layout.route(plan, self._group.index)
            slots_TK.copy_(self._layout.choose(ids_TK, handle.route))

        handle.planned = self._lane.submit(run)
        # The lane runs in order, so slots are known before the inner dispatcher reads them.
        handle.inner = self._inner.plan(slots_TK, weights_TK, label)
        return handle

    def dispatch(self, rows_TD: Tensor, weights_TK: Tensor, handle: Handle) -> Work[Arrived]:
        """Sends a copy of each token's row, with its weight, to the slots of its experts."""
        return self._inner.dispatch(rows_TD, weights_TK, own_handle(handle, BalancedHandle).inner)

    def dispatch_again(self, rows_TD: Tensor, handle: Handle) -> Work[Tensor]:
        """Sends a copy of each token's row to the slots of its experts; AD."""
        return self._inner.dispatch_again(rows_TD, own_handle(handle, BalancedHandle).inner)

    def combine(self, rows_AD: Tensor, handle: Handle) -> Work[Tensor]:
        """Returns the unweighted sum over each token's experts; TD."""
        return self._inner.combine(rows_AD, own_handle(handle, BalancedHandle).inner)

    def dispatch_backward(
        self, grad_rows_AD: Tensor, grad_weights_A: Tensor, handle: Handle
    ) -> Work[tuple[Tensor, Tensor]]:
        """Computes the gradients of rows, summed per token (TD), and of weights (TK)."""
        return self._inner.dispatch_backward(grad_rows_AD, grad_weights_A, own_handle(handle, BalancedHandle).inner)

    def combine_backward(self, grad_rows_TD: Tensor, handle: Handle) -> Work[Tensor]:
        """Sends a copy of each token's gradient to its experts' rows; AD."""
        return self._inner.combine_backward(grad_rows_TD, own_handle(handle, BalancedHandle).inner)

    def has_copies(self, handle: Handle) -> bool:
        """Returns whether any rank has a copy; waits on the host until the lane has planned."""
        routing = own_handle(handle, BalancedHandle)
        routing.planned.wait()
        return bool(routing.route.rounds)

    def copy_weights(self, weights: Sequence[Tensor], slots: Sequence[Tensor], handle: Handle) -> Work[None]:
        """Sends parts of experts, by expert (L), to the slots of their copies, by slot (S)."""
        routing = own_handle(handle, BalancedHandle)
        sources = [bytes_of(weight) for weight in weights]
        targets = [bytes_of(slot) for slot in slots]

        def run() -> None:
            first = 0
            for copies in routing.route.rounds:
                last = first + sum(copies.received)
                for source_LB, target_SB in zip(sources, targets, strict=True):
                    rows_NB = source_LB[list(copies.experts)]
                    arrived = target_SB[first:last]
                    self._send("weights of copies", routing, rows_NB, copies.sent, copies.received, arrived)
                first = last

        return self._lane.submit(run)

    def return_gradients(self, gradient: Tensor, handle: Handle) -> Work[list[tuple[int, Tensor]]]:
        """Sends gradients of S copies to their experts; returns sums by local expert, in a fixed order."""
        routing = own_handle(handle, BalancedHandle)

        def run() -> list[tuple[int, Tensor]]:
            sums: dict[int, Tensor] = {}
            first = 0
            for copies in routing.route.rounds:
                last = first + sum(copies.received)
                rows_NB = bytes_of(gradient[first:last])
                arrived = gradient.new_empty(len(copies.experts), *gradient.shape[1:])
                self._send("gradients of copies", routing, rows_NB, copies.received, copies.sent, bytes_of(arrived))
                for expert, part in zip(copies.experts, arrived, strict=True):
                    sums[expert] = sums[expert].add_(part) if expert in sums else part
                first = last
            return list(sums.items())

        return self._lane.submit(run)

    def close(self) -> None:
        """Closes the inner dispatcher."""
        self._inner.close()

    def _send(
        self,
        name: str,
        routing: BalancedHandle,
        rows_NB: Tensor,
        sent: Sequence[int],
        received: Sequence[int],
        arrived_MB: Tensor,
    ) -> None:
        layer = None if routing.label is None else routing.label.layer
        group = self._group
        self._traffic.add_predicted(layer, Spread.of(sent, group.nodes, group.index), rows_NB.shape[1])
        group.start(rows_NB, sent, received, name, routing.label, arrived_MB).wait()
