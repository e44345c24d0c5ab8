"""Plans copies of hot experts for one micro-batch of one layer, and the rows that each copy takes.

The plan is a pure function of the counts that every rank knows, in integers, so all ranks compute the same one. Copies
inside a node move rows from its fullest rank to its emptiest. In `exact` mode a few copies across nodes come first:
they take the rows that start on the copy's node before others, which saves those rows' way between nodes.
"""

# Shape legend: R ranks of the expert group, E experts of the layer, L = E / R experts of each rank, S slots of a rank
# for copies, N nodes of the group, C copies.

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
BalanceMode = Literal["node", "exact"]

# A rank or node above the mean by less than this fraction gets no further copy.
TOLERANCE = 0.004
# Bytes between nodes that copies may add, as a fraction of those of the rows without copies.
MAX_EXTRA_BYTES = 0.15


@dataclass(frozen=True, kw_only=True, slots=True)
class BalanceCosts:
    """Bytes that decide whether a copy on another node pays; forward and backward are counted together."""

    copy: int  # of an expert's weights to its copy, as often as they are sent, and of its gradient back
    row: int  # of a row to an expert and back


@dataclass(frozen=True, slots=True)
class RowPlan:
    """Copies of experts for one micro-batch of one layer.

    Attributes:
        slot_expert_RS: expert in each slot of each rank, -1 if the slot is free; never one of the rank's own.
        rows_RSR: rows that a slot takes from each source rank; the expert itself takes all others.
        loads_R: rows of each rank.
        extra_bytes: bytes between nodes that the plan adds; negative if it saves some.
    """

    slot_expert_RS: list[list[int]]
    rows_RSR: Ints
    loads_R: list[int]
    extra_bytes: int

    @property
    def num_copies(self) -> int:
        """Number of copies on all ranks."""
        return sum(expert >= 0 for experts in self.slot_expert_RS for expert in experts)


@dataclass(slots=True)
class _Loads:
    """Rows of ranks and nodes while copies are chosen."""

    num_slots: int
    nodes: Sequence[int]
    rank_R: list[int]  # rows of each rank
    own_R: list[dict[int, int]]  # rows of each rank's own experts that no copy takes
    members: dict[int, list[int]] = field(default_factory=dict)  # ranks of each node
    copies: list[tuple[int, int, int]] = field(default_factory=list)  # expert, rank and rows of each copy
    slots_R: list[list[int]] = field(default_factory=list)  # experts in the slots of each rank

    def __post_init__(self) -> None:
        self.slots_R = [[] for _ in self.rank_R]
        for rank, node in enumerate(self.nodes):
            self.members.setdefault(node, []).append(rank)

    def of_node(self, node: int) -> int:
        return sum(self.rank_R[rank] for rank in self.members[node])

    def above_mean(self, node: int) -> float:
        """Returns the rows of a node beyond its ranks' share of all rows."""
        return self.of_node(node) - sum(self.rank_R) * len(self.members[node]) / len(self.rank_R)

    def largest(self, homes: Sequence[int], rank: int) -> tuple[int, int]:
        """Returns the most rows of an expert of the ranks `homes` that `rank` has no copy of, and the expert."""
        return max(
            (
                (rows, expert)
                for home in homes
                for expert, rows in self.own_R[home].items()
                if expert not in self.slots_R[rank]
            ),
            default=(0, -1),
        )

    def emptiest(self, ranks: Sequence[int]) -> int | None:
        """Returns the rank with the fewest rows of those with a free slot."""
        free = [rank for rank in ranks if len(self.slots_R[rank]) < self.num_slots]
        return min(free, key=self.rank_R.__getitem__) if free else None

    def move(self, expert: int, home: int, rank: int, rows: int) -> None:
        """Gives rows of an expert to a new copy."""
        self.own_R[home][expert] -= rows
        self.rank_R[home] -= rows
        self.rank_R[rank] += rows
        self.slots_R[rank].append(expert)
        self.copies.append((expert, rank, rows))


def plan_rows(counts_RE: Ints, nodes: Sequence[int], *, slots: int, mode: BalanceMode, costs: BalanceCosts) -> RowPlan:
    """Plans copies from the rows that each source rank has for each expert.

    Args:
        counts_RE: rows of each source rank for each expert; rank r holds experts r L to (r + 1) L - 1.
        nodes: node of each rank, ascending.
        slots: most copies that a rank holds.
        mode: `node` for copies inside nodes only, so that no row changes its node; `exact` also across nodes.
    """
    num_ranks, num_experts = counts_RE.shape
    num_local = num_experts // num_ranks
    own_RL = counts_RE.sum(0).reshape(num_ranks, num_local).tolist()
    loads = _Loads(
        num_slots=slots,
        nodes=nodes,
        rank_R=list(map(sum, own_RL)),
        own_R=[dict(enumerate(own_L, rank * num_local)) for rank, own_L in enumerate(own_RL)],
    )
    extra_bytes = _copy_across_nodes(loads, counts_RE, costs) if mode == "exact" else 0
    num_across = len(loads.copies)
    for ranks in loads.members.values():
        _copy_inside_node(loads, ranks)
    rows_RSR = np.zeros((num_ranks, slots, num_ranks), np.int64)
    for (expert, rank, _), rows_R in zip(
        loads.copies, _rows_of_copies(loads.copies, num_across, counts_RE, np.asarray(nodes)), strict=True
    ):
        rows_RSR[rank, loads.slots_R[rank].index(expert)] = rows_R
    slot_expert_RS = [experts + [-1] * (slots - len(experts)) for experts in loads.slots_R]
    return RowPlan(slot_expert_RS, rows_RSR, loads.rank_R, extra_bytes)


def _copy_across_nodes(loads: _Loads, counts_RE: Ints, costs: BalanceCosts) -> int:
    """Moves rows from the fullest node to the emptiest; returns the bytes that this adds."""
    num_ranks, num_experts = counts_RE.shape
    num_local = num_experts // num_ranks
    counts_NE = {node: counts_RE[ranks].sum(0).tolist() for node, ranks in loads.members.items()}
    total = sum(loads.rank_R)
    stay = sum(
        counts_NE[node][expert]
        for node, ranks in loads.members.items()
        for expert in range(ranks[0] * num_local, (ranks[-1] + 1) * num_local)
    )
    budget = int(MAX_EXTRA_BYTES * (total - stay) * costs.row)
    extra = 0
    sent = [0] * num_ranks
    open_nodes = set(loads.members)
    while len(open_nodes) > 1:
        full = max(loads.members, key=lambda node: loads.above_mean(node) / len(loads.members[node]))
        empty = min(open_nodes - {full}, key=lambda node: (loads.above_mean(node) / len(loads.members[node]), node))
        excess, lack = loads.above_mean(full), -loads.above_mean(empty)
        if excess <= TOLERANCE * total * len(loads.members[full]) / num_ranks or lack <= 0:
            break
        rank = loads.emptiest(loads.members[empty])
        if rank is None:
            open_nodes.remove(empty)
            continue
        # A copy of more rows than a rank's share would make its rank the fullest. Of the homes with an expert of as
        # many rows as can move, the one that has sent the fewest copies sends: all ranks wait for the busiest link.
        limit = int(min(excess, lack, total // num_ranks))
        best = [(*loads.largest([home], rank), home) for home in loads.members[full]]
        most, expert, home = max(best, key=lambda each: (min(each[0], limit), -sent[each[2]], each[0]))
        rows = min(most, limit)
        if rows == 0:
            break
        # Rows from the copy's node need not leave it; rows from the expert's node, which come last, now do.
        from_empty, from_full = counts_NE[empty][expert], counts_NE[full][expert]
        leaving = max(0, rows - (sum(counts_NE[node][expert] for node in counts_NE) - from_full))
        added = costs.copy - (min(rows, from_empty) - leaving) * costs.row
        if extra + added > budget:
            break
        extra += added
        sent[home] += 1
        loads.move(expert, home, rank, rows)
    return extra


def _copy_inside_node(loads: _Loads, ranks: Sequence[int]) -> None:
    """Moves rows from the fullest rank of a node to the emptiest until they are even or slots are full."""
    mean = sum(loads.rank_R[rank] for rank in ranks) / len(ranks)
    while True:
        full = max(ranks, key=loads.rank_R.__getitem__)
        rank = loads.emptiest(ranks)
        if rank is None or loads.rank_R[full] <= mean * (1 + TOLERANCE):
            return
        most, expert = loads.largest([full], rank)
        rows = int(min(loads.rank_R[full] - mean, mean - loads.rank_R[rank], most))
        if rows <= 0:
            return
        loads.move(expert, full, rank, rows)


def _rows_of_copies(
    copies: Sequence[tuple[int, int, int]], num_across: int, counts_RE: Ints, nodes_R: Ints
) -> Iterator[Ints]:
    """Yields the rows of each copy by source rank; the first `num_across` copies are across nodes."""
    num_ranks, num_experts = counts_RE.shape
    left_RE = counts_RE.copy() if num_across else counts_RE
    for expert, rank, rows in copies[:num_across]:
        home_node = nodes_R[expert // (num_experts // num_ranks)]
        order_R = np.argsort(1 + (nodes_R == home_node) - (nodes_R == nodes_R[rank]), kind="stable")
        have_R = left_RE[order_R, expert]
        taken_R = np.zeros(num_ranks, np.int64)
        taken_R[order_R] = np.clip(rows - (have_R.cumsum() - have_R), 0, have_R)
        left_RE[:, expert] -= taken_R
        yield taken_R
    inside = copies[num_across:]
    if not inside:
        return
    # Copies of an expert take consecutive intervals of its rows in the order of source ranks.
    ends: dict[int, int] = {}
    begins_C = []
    for expert, _, rows in inside:
        begins_C.append(ends.get(expert, 0))
        ends[expert] = begins_C[-1] + rows
    begins = np.asarray(begins_C)
    have_RC = left_RE[:, [expert for expert, _, _ in inside]]
    upto_RC = have_RC.cumsum(0)
    ends_C = begins + np.asarray([rows for _, _, rows in inside])
    taken_RC = np.minimum(upto_RC, ends_C) - np.maximum(upto_RC - have_RC, begins)
    yield from np.maximum(taken_RC, 0).T
