"""Plan of an all-to-all exchange: how many rows each rank sends to each other, and in which order.

Shape legend: R ranks of the expert group, T tokens of this rank, K experts per token, A arrived rows, E experts of the
layer, L = E / R local experts, N nodes of the group.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from comm.dispatch.expert_order import ExpertOrder, SortedChoices, count_choices, inverse_permutation
from comm.dispatch.node_cap import nodes_of_experts, touched_nodes, verify_cap
from comm.dispatch.process_group import ExchangeGroup
from comm.dispatch.traffic import Traffic
from comm.protocol import Label


class DispatchError(ValueError):
    """Experts that the ranks of a group cannot share."""


def num_local_experts(num_experts: int, num_ranks: int) -> int:
    """Returns the experts of each rank, L.

    Raises:
        DispatchError: the ranks do not divide the experts.
    """
    if num_experts % num_ranks:
        raise DispatchError(
            f"dispatch: the expert axis must divide {num_experts} routed experts, got {num_ranks} ranks"
        )
    return num_experts // num_ranks


@dataclass(frozen=True, slots=True)
class AllToAllCounts:
    """What an exchange of counts leaves behind, still on the device.

    choices: sorted. touched_TN: the nodes that each token touches. numbers: choices dropped, of each expert (1 + E),
    tokens that touch each node (N), then what each rank sends here (R (L + 1)): rows for each local expert, and that
    rank's tokens over the cap.
    """

    choices: SortedChoices
    touched_TN: Tensor
    numbers: Tensor


@dataclass(frozen=True, slots=True)
class AllToAllRoute:
    """What a transfer needs, on the host: rows to and from each rank, and how arrived rows are sorted.

    sorted_A: the arrival place of each row in (local expert, source rank) order; arrival_A: its inverse. Both
    are None where arrival order is expert order already.
    """

    order: ExpertOrder
    sent: tuple[int, ...]
    received: tuple[int, ...]
    counts: tuple[int, ...]
    min_rows_across_nodes: int
    sorted_A: Tensor | None
    arrival_A: Tensor | None


class AllToAllPlanner:
    """Makes routes over one expert group. Used from the comm lane alone."""

    def __init__(self, group: ExchangeGroup, num_experts: int, max_nodes: int | None, traffic: Traffic) -> None:
        """Prepares plans; `max_nodes`: that a token may touch, any number if None. Raises DispatchError."""
        self.num_local_experts = num_local_experts(num_experts, len(group.members))
        self._group = group
        self._num_experts = num_experts
        self._node_of_expert_E = nodes_of_experts(num_experts, group.nodes)
        self._num_nodes = len(set(group.nodes))
        self._home = sorted(set(group.nodes)).index(group.nodes[group.place])
        self._max_nodes = self._num_nodes if max_nodes is None else max_nodes
        self._traffic = traffic

    def exchange(self, ids_TK: Tensor, label: Label | None) -> AllToAllCounts:
        """Counts rows per (destination rank, local expert) and sends each rank its part."""
        self._node_of_expert_E = self._node_of_expert_E.to(ids_TK.device)
        counts = count_choices(ids_TK, self._num_experts)
        touched_TN = touched_nodes(ids_TK, self._node_of_expert_E, self._num_nodes)
        num_ranks = len(self._group.members)
        # Row r holds the counts for each expert of rank r, and this rank's tokens over the cap: R by L + 1.
        num_over = (touched_TN.sum(1) > self._max_nodes).sum()
        counts_RL = counts[1:].view(num_ranks, self.num_local_experts)
        pending = self._group.start_numbers(torch.cat([counts_RL, num_over.expand(num_ranks, 1)], 1), label)
        # Sorting overlaps the exchange.
        choices = SortedChoices.sort(ids_TK)
        return AllToAllCounts(choices, touched_TN, torch.cat([counts, touched_TN.sum(0), pending.wait().flatten()]))

    def complete(self, counted: AllToAllCounts, label: Label | None) -> AllToAllRoute:
        """Reads the counts, which waits for the device, and derives splits and orders.

        Raises:
            NodeCapError: on all ranks, if a token of any rank is over the cap.
        """
        num_experts, num_local, num_ranks = self._num_experts, self.num_local_experts, len(self._group.members)
        numbers = counted.numbers.tolist()  # host sync
        # [dropped | rows for each expert, E | tokens that touch each node, N | from each rank, L + 1]
        counts_E, table = numbers[1 : 1 + num_experts], numbers[1 + num_experts + self._num_nodes :]
        rows = _rows(table, num_local + 1)
        touched_N = numbers[1 + num_experts : 1 + num_experts + self._num_nodes]
        num_over_R = [row.pop() for row in rows]
        verify_cap(num_over_R, self._group, counted.touched_TN, self._max_nodes, label)
        self._traffic.add_plan(None if label is None else label.layer, len(counted.touched_TN), sum(touched_N))
        received = tuple(map(sum, rows))
        # With one rank or one local expert, rows arrive in the order of experts.
        # With one rank or one local expert, rows arrive in the order of experts.
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
    """Returns the arrival places of rows by (local expert, source rank), from counts by (source, local expert)."""
    # Where each block (source, expert) begins in arrival order, read in the order (expert, source): L R.
    # Where each block (source, expert) begins in arrival order, read in the order (expert, source): L R.
    lengths = received_RL.flatten()
    starts_LR = (lengths.cumsum(0) - lengths).view_as(received_RL).T.flatten()
    # A row moves by the difference between where its block begins there and here.
    # A row moves by the difference between where its block begins there and here.
    lengths_LR = received_RL.T.flatten()
    shifts_LR = starts_LR - (lengths_LR.cumsum(0) - lengths_LR)
    places = torch.arange(num_arrived, device=received_RL.device)
    return places + shifts_LR.repeat_interleave(lengths_LR, output_size=num_arrived)
