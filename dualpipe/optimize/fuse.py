"""Fuses neighboring groups into one, so that computation of one hides exchange of the other."""

from dataclasses import replace

from dualpipe.ir import Op, Schedule
from dualpipe.simulate.costs import CostModel
from dualpipe.simulate.timing import NumberedGroup, Timing, TimingProgress

_MAX_SWEEPS = 6
# Groups of two first: groups of three are then only formed where they help, so they never make a schedule longer.
_SIZES = (2, 3)
_ROUNDING = 1e-9


def fuse(schedule: Schedule, costs: CostModel) -> Schedule:
    """Fuses neighboring groups of different micro-batches into groups of two or three, such as F&I&W.

    A hill climb over all ranks together, from the start of the schedule to its end, is repeated until nothing improves.
    Two groups are tried together if that takes less time than one after the other. It is kept if neither the makespan,
    nor (on a tie) the sum of the ranks' ends, nor the rank's peak memory grows.

    Args:
        schedule: a valid schedule.
        costs: costs of its stages; without exchange nothing is fused.
    """
    return _HillClimb(schedule, costs).climb() if exchanges(costs) else schedule


def exchanges(costs: CostModel) -> bool:
    """Returns whether any stage has exchange that groups could hide."""
    return any(stage.forward_exchange or stage.backward_exchange for stage in costs.stages)


class _HillClimb:
    """Hill climb over the groups of a schedule. Operations are numbers."""

    def __init__(self, schedule: Schedule, costs: CostModel) -> None:
        self._schedule = schedule
        self._most_members = _SIZES[0]
        self._timing = Timing(schedule, costs)
        self._ranks = [self._timing.numbered(groups) for groups in schedule.ranks]
        self._weights = [costs.stages[op.stage].activation for op in self._timing.operations]
        self._caps = [self._peak(groups) for groups in self._ranks]
        start = self._timing.begin(self._ranks)
        self._best = self._measure(start, float("inf"))

    def climb(self) -> Schedule:
        """Returns the fused schedule."""
        for self._most_members in _SIZES:
            for _ in range(_MAX_SWEEPS):
                if not self._sweep():
                    break
        operations = self._timing.operations
        ranks = tuple(tuple(tuple(operations[n] for n in group) for group in groups) for groups in self._ranks)
        return replace(self._schedule, ranks=ranks)

    def _sweep(self) -> bool:
        """Tries every pair once, in order, and returns whether one was kept."""
        has_kept = False
        before = self._timing.begin(self._ranks)
        for index in range(max(map(len, self._ranks))):
            self._timing.advance(self._ranks, before, until=index)
            for rank, groups in enumerate(self._ranks):
                if index + 1 < len(groups) and self._is_faster(groups[index], groups[index + 1]):
                    has_kept = self._try(rank, index, before) or has_kept
        return has_kept

    def _is_faster(self, first: NumberedGroup, second: NumberedGroup) -> bool:
        if len(first) + len(second) > self._most_members:
            return False
        operations = [self._timing.operations[number] for number in first + second]
        if len({op[1:] for op in operations}) < len(operations):  # direction, stage and micro-batch
            return False
        duration = self._timing.duration
        return duration(first + second) < duration(first) + duration(second) - 1e-12

    def _try(self, rank: int, index: int, before: TimingProgress) -> bool:
        """Fuses a pair and returns whether it is kept; `before` is the progress up to the pair."""
        old = self._ranks[rank]
        first, second = old[index : index + 2]
        groups = [*old[:index], first + second, *old[index + 2 :]]
        if self._peak(groups) > self._caps[rank] + 1e-9:
            return False
        duration = self._timing.duration
        saved = duration(first) + duration(second) - duration(first + second)
        self._ranks[rank] = groups
        before.left[rank] -= saved
        found = self._measure(before.copy(), self._best[0])
        if found <= self._best:
            self._best = found
            return True
        self._ranks[rank] = old
        before.left[rank] += saved
        return False

    def _measure(self, progress: TimingProgress, limit: float) -> tuple[float, float]:
        """Returns makespan and sum of the ranks' ends, rounded for exact ties; infinite over the limit."""
        worst = float("inf"), float("inf")
        if not self._timing.advance(self._ranks, progress, limit=limit + _ROUNDING * max(limit, 1.0)):
            return worst
        if any(at < len(groups) for at, groups in zip(progress.position, self._ranks, strict=True)):
            return worst
        return round(max(progress.clock), 9), round(sum(progress.clock), 9)

    def _peak(self, groups: list[NumberedGroup]) -> float:
        operations, weights = self._timing.operations, self._weights
        alive = peak = 0.0
        for group in groups:
            alive += sum(weights[n] for n in group if operations[n].kind is Op.FORWARD)
            peak = max(peak, alive)
            alive -= sum(weights[n] for n in group if operations[n].kind in (Op.BACKWARD, Op.BACKWARD_WEIGHT))
        return peak
