"""Times orders of groups with one clock per rank, advanced by groups and by values that they need.

The simulator runs it once and the optimizations hundreds of times, so operations are numbers here.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dualpipe.ir import Op, Operation, Schedule
from dualpipe.simulate.costs import CostModel, overlapped_time
from dualpipe.transfers import made_by, message_of, needed_by

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
        clock: end of each rank's last group.
        left: time of each rank's remaining groups, without waits.
    """

    ends: list[float]
    position: list[int]
    clock: list[float]
    left: list[float]

    def copy(self) -> "TimingProgress":
        """Returns an independent copy."""
        return TimingProgress(
            ends=self.ends.copy(), position=self.position.copy(), clock=self.clock.copy(), left=self.left.copy()
        )


class Timing:
    """Numbered operations of a schedule, with their costs and dependencies, for any order of groups.

    Attributes:
        operations: the operations by number.
    """

    def __init__(self, schedule: Schedule, costs: CostModel) -> None:
        """Numbers the operations of a schedule in any order, and computes their costs and dependencies."""
        self.operations = tuple(op for groups in schedule.ranks for group in groups for op in group)
        self._numbers = {op: number for number, op in enumerate(self.operations)}
        self._lanes = [(costs.compute_of(op), costs.exchange_of(op)) for op in self.operations]
        self._durations: dict[NumberedGroup, float] = {}
        self._needed, self._lags = self._edges(schedule, costs.latency)
        self._before = [self._predecessor(op) for op in self.operations]

    def numbered(self, groups: Iterable[Sequence[Operation]]) -> list[NumberedGroup]:
        """Converts a rank's groups to numbers."""
        return [tuple(self._numbers[op] for op in group) for group in groups]

    def duration(self, group: NumberedGroup) -> float:
        """Returns the time of a group; see `CostModel.duration_of`."""
        known = self._durations.get(group)
        if known is None:
            known = self._durations[group] = overlapped_time([self._lanes[number] for number in group])
        return known

    def compute(self, group: NumberedGroup) -> float:
        """Returns the computation time of a group's operations."""
        return sum(self._lanes[number][0] for number in group)

    def begin(self, ranks: RankGroups) -> TimingProgress:
        """Returns the progress before the first group; `ranks` must contain all operations once."""
        return TimingProgress(
            ends=[-1.0] * len(self.operations),
            position=[0] * len(ranks),
            clock=[0.0] * len(ranks),
            left=[sum(map(self.duration, groups)) for groups in ranks],
        )

    def advance(
        self, ranks: RankGroups, progress: TimingProgress, until: int | None = None, limit: float = float("inf")
    ) -> bool:
        """Runs each rank's groups in order, each as early as possible, until ranks end or block.

        Args:
            ranks: groups of every rank; the groups that have run must be unchanged.
            progress: progress of the ranks; it is updated.
            until: number of groups after which every rank stops; None for all.
            limit: time by which all ranks must end; the call stops when a rank cannot.

        Returns:
            Whether all ranks can still end by the limit.
        """
        ends, left = progress.ends, progress.left
        blocked: dict[int, list[int]] = {}
        ready = list(range(len(ranks)))[::-1]
        while ready:
            rank = ready.pop()
            groups, time = ranks[rank], progress.clock[rank]
            for index in range(progress.position[rank], len(groups) if until is None else min(until, len(groups))):
                group = groups[index]
                start, missing = self.ready(group, time, ends)
                if missing >= 0:
                    blocked.setdefault(missing, []).append(rank)
                    break
                if start + left[rank] > limit:
                    return False
                duration = self.duration(group)
                time = start + duration
                left[rank] -= duration
                progress.position[rank] = index + 1
                for number in group:
                    ends[number] = time
                    if number in blocked:
                        ready += blocked.pop(number)
            progress.clock[rank] = time
        return True

    def run(self, ranks: RankGroups) -> list[float]:
        """Returns the end of every operation by number; -1 for operations in a deadlock."""
        progress = self.begin(ranks)
        self.advance(ranks, progress)
        return progress.ends

    def ready(self, group: NumberedGroup, time: float, ends: list[float]) -> tuple[float, int]:
        """Returns the start of a group on a rank free at `time`, and -1 or an operation that must run first."""
        for number in group:
            before = self._before[number]
            if before >= 0 and ends[before] < 0:
                return time, before
            needed = self._needed[number]
            if needed >= 0:
                arrival = ends[needed]
                if arrival < 0:
                    return time, needed
                arrival += self._lags[number]
                if arrival > time:
                    time = arrival
        return time, -1

    def _edges(self, schedule: Schedule, latency: float) -> tuple[list[int], list[float]]:
        makers = {made_by(op, schedule.num_stages): number for number, op in enumerate(self.operations)}
        needed, lags = [], []
        for op in self.operations:
            value = needed_by(op, schedule.num_stages)
            # If no operation makes the value, the operation waits for itself and never runs.
            needed.append(-1 if value is None else makers.get(value, self._numbers[op]))
            lags.append(0.0 if value is None or message_of(schedule, value) is None else latency)
        return needed, lags

    def _predecessor(self, op: Operation) -> int:
        """Returns the operation of the same micro-batch and stage that must run before, or -1."""
        match op.kind:
            case Op.BACKWARD | Op.BACKWARD_INPUT:
                before = Op.FORWARD
            case Op.BACKWARD_WEIGHT:
                before = Op.BACKWARD_INPUT
            case Op.FORWARD:
                return -1
        return self._numbers.get(Operation(before, op.direction, op.stage, op.micro_batch), -1)
