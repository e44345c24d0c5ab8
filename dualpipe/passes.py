"""Transforms schedules with pure functions."""

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from heapq import heappop, heappush

from dualpipe.ir import Group, Op, Operation, Schedule
from dualpipe.simulate.costs import CostModel
from dualpipe.simulate.timing import NumberedGroup, Timing

# Forwards start before the group frees any activation, as the count of live activations assumes. Weight gradients are
# last, because no rank waits for them. Each kind keeps its order, which is the order of its link.
_PRIORITY = {
    Op.FORWARD: 0,
    Op.BACKWARD: 1,
    Op.BACKWARD_INPUT: 1,
    Op.BACKWARD_WEIGHT: 2,
    Op.OFFLOAD: 3,
    Op.RELOAD: 3,
}


def order_members(group: Group) -> Group:
    """Returns the operations of a group in the order in which a rank runs them in sequence."""
    return tuple(sorted(group, key=lambda op: _PRIORITY[op.kind]))


def forward_only(schedule: Schedule) -> Schedule:
    """Returns the schedule with only its forwards, in their order, for validation. Drops empty groups."""
    return replace(schedule, ranks=tuple(_forwards(groups) for groups in schedule.ranks))


def ungroup(schedule: Schedule) -> Schedule:
    """Returns the schedule without overlap: one group per operation, in the order of `order_members`."""
    ranks = (tuple((op,) for group in groups for op in order_members(group)) for groups in schedule.ranks)
    return replace(schedule, ranks=tuple(ranks))


def split_backwards(schedule: Schedule) -> Schedule:
    """Replaces every B by I and a separate W after it, so that the input gradient is sent before W runs."""
    return replace(schedule, ranks=tuple(_split(groups) for groups in schedule.ranks))


def _forwards(groups: tuple[Group, ...]) -> tuple[Group, ...]:
    kept = (tuple(op for op in group if op.kind is Op.FORWARD) for group in groups)
    return tuple(group for group in kept if group)


def _split(groups: tuple[Group, ...]) -> tuple[Group, ...]:
    made: list[Group] = []
    for group in groups:
        backwards = [op for op in group if op.kind is Op.BACKWARD]
        made.append(tuple(op.with_kind(Op.BACKWARD_INPUT) if op.kind is Op.BACKWARD else op for op in group))
        made += [(op.with_kind(Op.BACKWARD_WEIGHT),) for op in backwards]
    return tuple(made)


_ROUNDING = 1e-9


def place_weights(schedule: Schedule, costs: CostModel, memory_cap: float, patience: float = 0.0) -> Schedule | None:
    """Keeps every rank's order of F and I, and inserts its W, oldest first.

    A W runs if the input of the next group has not arrived, or if that group's forwards would exceed the cap.

    Args:
        schedule: a valid schedule without full backwards.
        memory_cap: maximum of a rank's live activations, in the unit of `StageCosts.activation`.
        patience: fraction of a W's time that a rank waits for an input instead of running the W, if the arrival time is
            known.

    Returns:
        A schedule of the same operations, or None if its order of F and I does not fit the cap.
    """
    placing = _WeightPlacement(schedule, costs, memory_cap, patience)
    ranks = placing.run()
    return None if ranks is None else replace(schedule, ranks=ranks)


class _WeightPlacement:
    """Simulation of all ranks on a common clock that places the W."""

    def __init__(self, schedule: Schedule, costs: CostModel, memory_cap: float, patience: float) -> None:
        self._timing = Timing(schedule, costs)
        self._costs = costs
        self._room = [memory_cap + _ROUNDING for _ in schedule.ranks]
        self._patience = patience
        bare = [_without_weights(groups) for groups in schedule.ranks]
        self._groups = [self._timing.numbered(groups) for groups in bare]
        self._next = [0 for _ in bare]
        self._clock = [0.0 for _ in bare]
        self._waiting: list[deque[Operation]] = [deque() for _ in bare]
        self._made: list[list[Group]] = [[] for _ in bare]
        self._ends = [-1.0] * len(self._timing.operations)
        self._blocked: dict[int, int] = {}
        self._events = [(0.0, rank) for rank in range(len(bare))]

    def run(self) -> tuple[tuple[Group, ...], ...] | None:
        while self._events:
            time, rank = heappop(self._events)
            self._clock[rank] = time
            self._step(rank)
        unfinished = any(at < len(groups) for at, groups in zip(self._next, self._groups, strict=True))
        return None if unfinished else tuple(map(tuple, self._made))

    def _step(self, rank: int) -> None:
        """Starts one group, or blocks the rank until the arrival time of its input is known."""
        waiting = self._waiting[rank]
        if self._next[rank] == len(self._groups[rank]):
            if waiting:
                self._run_weight(rank)
            return
        group = self._groups[rank][self._next[rank]]
        start, missing = self._timing.ready(group, self._clock[rank], self._ends)
        fits = self._weight_of(group) <= self._room[rank]
        max_wait = self._patience * self._costs.compute_of(waiting[0]) if waiting else 0.0
        if waiting and (not fits or missing >= 0 or start > self._clock[rank] + max_wait + _ROUNDING):
            self._run_weight(rank)
        elif missing >= 0:
            self._blocked[missing] = rank
        elif fits:
            self._run(rank, group, start)

    def _weight_of(self, group: NumberedGroup) -> float:
        forwards = (op for op in map(self._timing.operations.__getitem__, group) if op.kind is Op.FORWARD)
        return sum(self._costs.stages[op.stage].activation for op in forwards)

    def _run_weight(self, rank: int) -> None:
        op = self._waiting[rank].popleft()
        self._made[rank].append((op,))
        self._room[rank] += self._costs.stages[op.stage].activation
        heappush(self._events, (self._clock[rank] + self._costs.compute_of(op), rank))

    def _run(self, rank: int, group: NumberedGroup, start: float) -> None:
        operations = self._timing.operations
        end = start + self._timing.duration(group)
        self._next[rank] += 1
        self._made[rank].append(tuple(operations[number] for number in group))
        self._room[rank] -= self._weight_of(group)
        heappush(self._events, (end, rank))
        for number in group:
            op = operations[number]
            self._ends[number] = end
            if op.kind is Op.BACKWARD_INPUT:
                self._waiting[rank].append(op.with_kind(Op.BACKWARD_WEIGHT))
            if number in self._blocked:
                # The blocked rank is processed again now, as there may be time for another W before the arrival.
                blocked = self._blocked.pop(number)
                heappush(self._events, (max(self._clock[blocked], start), blocked))


def _without_weights(groups: Sequence[Group]) -> list[Group]:
    kept = (tuple(op for op in group if op.kind is not Op.BACKWARD_WEIGHT) for group in groups)
    return [group for group in kept if group]
