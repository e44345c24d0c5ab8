"""A clock per rank, moved by groups and by the values they wait for: made once, run over many orders of the groups.

The simulator runs it once, the passes hundreds of times, so operations are numbers here.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dualpipe.ir import Op, Operation, Schedule
from dualpipe.simulate.costs import CostModel, overlapped_time
from dualpipe.transfers import made_by, message_of, needed_by

NumberedGroup = tuple[int, ...]
"""Operations of a group by their numbers in a `Timing`."""

RankGroups = Sequence[Sequence[NumberedGroup]]
"""The groups of every rank, in order."""


@dataclass(slots=True, kw_only=True)
class TimingProgress:
    """How far every rank has come.

    `ends`: of operations, by number, -1 for those that have not run; by rank, `position`: how many groups have run,
    `clock`: the end of the last of them, `left`: the time of the rest, without waiting.
    """

    ends: list[float]
    position: list[int]
    clock: list[float]
    left: list[float]

    def copy(self) -> "TimingProgress":
        """Returns a copy that can be moved on by itself."""
        return TimingProgress(
            ends=self.ends.copy(), position=self.position.copy(), clock=self.clock.copy(), left=self.left.copy()
        )


class Timing:
    """The operations of a schedule, numbered, with what each costs and waits for; not the order they run in.

    Attributes:
        operations: by number.
    """

    def __init__(self, schedule: Schedule, costs: CostModel) -> None:
        """`schedule`: any order of the operations to be timed. `costs`: of its stages."""
        self.operations = tuple(op for groups in schedule.ranks for group in groups for op in group)
        self._numbers = {op: number for number, op in enumerate(self.operations)}
        self._lanes = [(costs.compute_of(op), costs.exchange_of(op)) for op in self.operations]
        self._durations: dict[NumberedGroup, float] = {}
        self._needed, self._lags = self._edges(schedule, costs.latency)
        self._before = [self._predecessor(op) for op in self.operations]

    def numbered(self, groups: Iterable[Sequence[Operation]]) -> list[NumberedGroup]:
        """Returns a rank's groups by the numbers of their operations."""
        return [tuple(self._numbers[op] for op in group) for group in groups]

    def duration(self, group: NumberedGroup) -> float:
        """Returns a group's time: `CostModel.duration_of`."""
        known = self._durations.get(group)
        if known is None:
            known = self._durations[group] = overlapped_time([self._lanes[number] for number in group])
        return known

    def compute(self, group: NumberedGroup) -> float:
        """Returns the computation of a group's members."""
        return sum(self._lanes[number][0] for number in group)

    def begin(self, ranks: RankGroups) -> TimingProgress:
        """Before the first group of every rank. `ranks`: the groups of every rank, all operations once."""
        return TimingProgress(
            ends=[-1.0] * len(self.operations),
            position=[0] * len(ranks),
            clock=[0.0] * len(ranks),
            left=[sum(map(self.duration, groups)) for groups in ranks],
        )

    def advance(
        self, ranks: RankGroups, progress: TimingProgress, until: int | None = None, limit: float = float("inf")
    ) -> bool:
        """Runs each rank's groups in order, each as soon as it can, as far as they come.

        Args:
            ranks: the groups of every rank, those that have run as they were.
            progress: how far they are; it is moved on.
            until: the number of groups after which every rank stops; None for all.
            limit: gives up where a rank can no longer end by it.

        Returns:
            Whether all may still end by the limit.
        """
        ends, left = progress.ends, progress.left
        blocked: dict[int, list[int]] = {}
        awake = list(range(len(ranks)))[::-1]
        while awake:
            rank = awake.pop()
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
                        awake += blocked.pop(number)
            progress.clock[rank] = time
        return True

    def run(self, ranks: RankGroups) -> list[float]:
        """Returns the end of every operation, by number; -1 for those that wait for ever."""
        progress = self.begin(ranks)
        self.advance(ranks, progress)
        return progress.ends

    def ready(self, group: NumberedGroup, time: float, ends: list[float]) -> tuple[float, int]:
        """When a group can start at a rank that is free from `time` on; or the first operation that it lacks."""
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
            # A value that nobody makes is waited for for ever: by the operation itself.
            needed.append(-1 if value is None else makers.get(value, self._numbers[op]))
            lags.append(0.0 if value is None or message_of(schedule, value) is None else latency)
        return needed, lags

    def _predecessor(self, op: Operation) -> int:
        """Returns what the same micro-batch must have been through in the same stage: -1 where nothing."""
        match op.kind:
            case Op.BACKWARD | Op.BACKWARD_INPUT:
                before = Op.FORWARD
            case Op.BACKWARD_WEIGHT:
                before = Op.BACKWARD_INPUT
            case Op.FORWARD:
                return -1
        return self._numbers.get(Operation(before, op.direction, op.stage, op.micro_batch), -1)
