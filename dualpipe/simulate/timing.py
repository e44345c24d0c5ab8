"""Times orders of groups with one clock per rank, advanced by groups and by values that they need.

The simulator runs it once and the optimizations hundreds of times, so operations are numbers here.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from dualpipe.ir import Op, Operation, Schedule
from dualpipe.simulate.costs import CostModel, overlapped_time

_BACKWARDS = (Op.BACKWARD, Op.BACKWARD_INPUT)
_COPIES = (Op.OFFLOAD, Op.RELOAD)
_BEFORE = {
    Op.BACKWARD: (Op.RELOAD, Op.FORWARD),
    Op.BACKWARD_INPUT: (Op.RELOAD, Op.FORWARD),
    Op.BACKWARD_WEIGHT: (Op.BACKWARD_INPUT,),
    Op.OFFLOAD: (Op.FORWARD,),
    Op.RELOAD: (Op.OFFLOAD,),
}
"""Kinds of operations of the same micro-batch and stage, of which the first that exists must run before each kind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CopySpan:
    """Time span of the copy of an offload or reload between a rank's device and its host memory."""

    operation: Operation
    start: float
    end: float


NumberedGroup = tuple[int, ...]
"""Group of operations, given by their numbers in a `Timing`."""

RankGroups = Sequence[Sequence[NumberedGroup]]
"""Groups of every rank, in order."""


@dataclass(slots=True, kw_only=True)
class TimingProgress:
    """Progress of all ranks.

    Attributes:
        ends: end of each operation by number, -1 if it has not run.
        position: number of groups that each rank has run.
        left: time of each rank's remaining groups, without waits.
        copied: end of the copy to the host of each offload by number, if its forward has run.
        to_host: time from which each rank's link to its host memory is free, as `from_host` for the other direction.
    """

    ends: list[float]
    position: list[int]
    clock: list[float]
    left: list[float]
    copied: dict[int, float]
    to_host: list[float]
    from_host: list[float]

    def copy(self) -> "TimingProgress":
        """Returns an independent copy."""
        return TimingProgress(
            ends=self.ends.copy(),
            position=self.position.copy(),
            clock=self.clock.copy(),
            left=self.left.copy(),
            copied=self.copied.copy(),
            to_host=self.to_host.copy(),
            from_host=self.from_host.copy(),
        )


class Timing:
    """Numbered operations of a schedule, with their costs and dependencies, for any order of groups."""

    def __init__(self, schedule: Schedule, costs: CostModel) -> None:
        self.operations = tuple([op for groups in schedule.ranks for group in groups for op in group])
        self._numbers: dict[tuple[Op, int, int, int], int] = {op: number for number, op in enumerate(self.operations)}
        lanes = {
            (kind, stage): (each.compute_of(kind), each.exchange_of(kind))
            for stage, each in enumerate(costs.stages)
            for kind in Op
        }
        self._lanes = [lanes[op[0], op[2]] for op in self.operations]
        self._durations: dict[NumberedGroup, float] = {}
        self._known_inputs: dict[NumberedGroup, tuple[tuple[int, float], ...]] = {}
        self._alone = costs.alone
        self._needed, self._lags = self._edges(schedule, costs.latency)
        # By number: the time of each copy, and the offload that follows a forward.
        self._copies = {n: costs.copy_time_of(op) for n, op in enumerate(self.operations) if op[0] in _COPIES}
        self._before = self._predecessors()
        self._offloads = {self._before[n]: n for n in self._copies if self.operations[n].kind is Op.OFFLOAD}

    def numbered(self, groups: Iterable[Sequence[Operation]]) -> list[NumberedGroup]:
        """Converts a rank's groups to numbers."""
        numbers = self._numbers
        return [tuple([numbers[op] for op in group]) for group in groups]

    def duration(self, group: NumberedGroup) -> float:
        """Returns the time of a group; see `CostModel.duration_of`."""
        known = self._durations.get(group)
        if known is None:
            lanes = [self._lanes[number] for number in group]
            known = self._durations[group] = overlapped_time(lanes, self._alone)
        return known

    def compute(self, group: NumberedGroup) -> float:
        """Returns the computation time of a group's operations; a lone one may be faster (`CostModel.alone`)."""
        return (self._alone if len(group) == 1 else 1.0) * sum(self._lanes[number][0] for number in group)

    def begin(self, ranks: RankGroups) -> TimingProgress:
        """Returns the progress before the first group; `ranks` must contain all operations once."""
        return TimingProgress(
            ends=[-1.0] * len(self.operations),
            position=[0] * len(ranks),
            clock=[0.0] * len(ranks),
            left=[sum(map(self.duration, groups)) for groups in ranks],
            copied={},
            to_host=[0.0] * len(ranks),
            from_host=[0.0] * len(ranks),
        )

    def advance(
        self, ranks: RankGroups, progress: TimingProgress, until: int | None = None, limit: float = float("inf")
    ) -> bool:
        """Runs each rank's groups in order, each as early as possible, until ranks end or block.

        Args:
            ranks: groups of every rank; the groups that have run must be unchanged.
            until: number of groups after which every rank stops; None for all.
            limit: time by which all ranks must end; the call stops when a rank cannot, and returns False.
        """
        ends = progress.ends
        left = progress.left
        clock = progress.clock
        position = progress.position
        known = self._durations
        duration_of = self.duration
        copies = self._copies
        known_inputs = self._known_inputs
        inputs_of = self._inputs_of
        blocked: dict[int, list[int]] = {}
        waiting = list(range(len(ranks)))[::-1]
        while waiting:
            rank = waiting.pop()
            groups = ranks[rank]
            time = clock[rank]
            for index in range(position[rank], len(groups) if until is None else min(until, len(groups))):
                group = groups[index]
                start = time
                missing = -1
                # As in `ready`, without a call for each group.
                for number, lag in known_inputs[group] if group in known_inputs else inputs_of(group):
                    arrival = ends[number]
                    if arrival < 0:
                        missing = number
                        break
                    if arrival + lag > start:
                        start = arrival + lag
                if missing >= 0:
                    blocked.setdefault(missing, []).append(rank)
                    break
                if start + left[rank] > limit:
                    return False
                duration = known[group] if group in known else duration_of(group)
                time = start + duration
                left[rank] -= duration
                position[rank] = index + 1
                for number in group:
                    ends[number] = time
                    if number in blocked:
                        waiting += blocked.pop(number)
                if copies:
                    time = self._run_copies(rank, group, time, progress)
            clock[rank] = time
        return True

    def _run_copies(self, rank: int, group: NumberedGroup, time: float, progress: TimingProgress) -> float:
        """Runs the copies of a group that the rank has finished at `time`, and returns when it is free."""
        first = group[0]
        if first not in self._copies:
            for number in group:
                if number in self._offloads:
                    offload = self._offloads[number]
                    progress.to_host[rank] = max(progress.to_host[rank], time) + self._copies[offload]
                    progress.copied[offload] = progress.to_host[rank]
        elif self.operations[first].kind is Op.OFFLOAD:
            time = progress.ends[first] = max(time, progress.copied[first])
        else:
            progress.ends[first] = progress.from_host[rank] = max(progress.from_host[rank], time) + self._copies[first]
        return time

    def copy_spans(self, groups: Sequence[NumberedGroup], ends: Sequence[float]) -> list[CopySpan]:
        """Returns the copies of a rank, given the ends of all operations."""
        spans: list[CopySpan] = []
        if not self._copies:
            return spans
        free = 0.0
        for number in (number for group in groups for number in group):
            if number in self._offloads:
                offload = self._offloads[number]
                start = max(free, ends[number])
                free = start + self._copies[offload]
                spans.append(CopySpan(operation=self.operations[offload], start=start, end=free))
            elif number in self._copies and self.operations[number].kind is Op.RELOAD:
                start = ends[number] - self._copies[number]
                spans.append(CopySpan(operation=self.operations[number], start=start, end=ends[number]))
        return spans

    def run(self, ranks: RankGroups) -> list[float]:
        """Returns the end of every operation by number; -1 for operations in a deadlock."""
        progress = self.begin(ranks)
        self.advance(ranks, progress)
        return progress.ends

    def ready(self, group: NumberedGroup, time: float, ends: list[float]) -> tuple[float, int]:
        """Returns the start of a group on a rank free at `time`, and -1 or an operation that must run first."""
        for number, lag in self._known_inputs.get(group) or self._inputs_of(group):
            arrival = ends[number]
            if arrival < 0:
                return time, number
            if arrival + lag > time:
                time = arrival + lag
        return time, -1

    def _inputs_of(self, group: NumberedGroup) -> tuple[tuple[int, float], ...]:
        inputs: list[tuple[int, float]] = []
        for number in group:
            if self._before[number] >= 0:  # only a reload may end after the rank is free
                inputs.append((self._before[number], 0.0))
            if self._needed[number] >= 0:
                inputs.append((self._needed[number], self._lags[number]))
        found = self._known_inputs[group] = tuple(inputs)
        return found

    def _edges(self, schedule: Schedule, latency: float) -> tuple[list[int], list[float]]:
        """Returns the operation of a neighboring stage that each operation needs, and the latency from it."""
        numbers = self._numbers
        last = schedule.num_stages - 1
        lags_of = [[latency if rank != after else 0.0 for rank, after in pairwise(row)] for row in schedule.placement]
        needed = []
        lags = []
        for own, (kind, direction, stage, micro_batch) in enumerate(self.operations):
            # If no operation makes the value, the operation waits for itself and never runs.
            source = None if schedule.cohorts is None else schedule.token_source(self.operations[own])
            if source is not None:
                row = schedule.placement[direction]
                needed.append(numbers.get(source, own))
                lags.append(latency if row[-1] != row[0] else 0.0)
            elif kind is Op.FORWARD and stage > 0:
                needed.append(numbers.get((kind, direction, stage - 1, micro_batch), own))
                lags.append(lags_of[direction][stage - 1])
            elif kind in _BACKWARDS and stage < last:
                found = numbers.get((Op.BACKWARD_INPUT, direction, stage + 1, micro_batch))
                needed.append(
                    numbers.get((Op.BACKWARD, direction, stage + 1, micro_batch), own) if found is None else found
                )
                lags.append(lags_of[direction][stage])
            else:
                needed.append(-1)
                lags.append(0.0)
        return needed, lags

    def _predecessors(self) -> list[int]:
        """Returns the operation of the same micro-batch and stage that must run before each operation, or -1."""
        get = self._numbers.get
        if not self._copies:  # most schedules, which are timed hundreds of times
            return [get((_BEFORE[op[0]][-1], *op[1:]), -1) if op[0] in _BEFORE else -1 for op in self.operations]
        found = ([get((kind, *op[1:]), -1) for kind in _BEFORE.get(op[0], ())] for op in self.operations)
        return [next((number for number in before if number >= 0), -1) for before in found]
