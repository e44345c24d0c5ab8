"""Fuses neighboring groups into one, so that computation of one hides exchange of the other."""

from collections.abc import Sequence
from dataclasses import replace

from dualpipe.ir import Group, Op, Operation, Schedule
from dualpipe.passes import _ROUNDING
from dualpipe.simulate.costs import CostModel
from dualpipe.simulate.timing import NumberedGroup, Timing, TimingProgress

_MAX_SWEEPS = 6
# Groups of two first: groups of three are then only formed where they help, so they never make a schedule longer.
_SIZES = (2, 3)
# Maximum number of ranks for which every pair of groups is tried in every sweep.
_MOST_THOROUGH = 16


def fuse(schedule: Schedule, costs: CostModel) -> Schedule:
    """Fuses neighboring groups of different micro-batches into groups of two or three, such as F&I&W.

    A hill climb from the start of the schedule to its end is repeated until nothing improves. A pair is kept if neither
    the makespan, nor (on a tie) the sum of the ranks' ends, nor the rank's peak memory grows.
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
        weights = [(op.kind, costs.stages[op.stage].activation) for op in self._timing.operations]
        self._made = [weight if kind is Op.FORWARD else 0.0 for kind, weight in weights]
        self._freed = [weight if kind in (Op.BACKWARD, Op.BACKWARD_WEIGHT) else 0.0 for kind, weight in weights]
        self._caps = [self._peak(groups) for groups in self._ranks]
        # With many ranks, both ranks of a mirror pair change together, and no pair is tried twice for one size.
        self._is_large = schedule.num_ranks > _MOST_THOROUGH
        self._moved = _mirror_pairs(schedule) if self._is_large else [(rank,) for rank in range(schedule.num_ranks)]
        self._rejected: set[tuple[NumberedGroup, NumberedGroup]] = set()
        start = self._timing.begin(self._ranks)
        self._best = self._measure(start, float("inf"))

    def climb(self) -> Schedule:
        for self._most_members in _SIZES:
            self._rejected.clear()
            for _ in range(_MAX_SWEEPS):
                if not self._sweep():
                    break
        operations = self._timing.operations
        ranks = tuple(tuple(tuple(operations[n] for n in group) for group in groups) for groups in self._ranks)
        return replace(self._schedule, ranks=ranks)

    def _sweep(self) -> bool:
        has_kept = False
        before = self._timing.begin(self._ranks)
        for index in range(max(map(len, self._ranks))):
            self._timing.advance(self._ranks, before, until=index)
            for ranks in self._moved:
                groups = self._ranks[ranks[0]]
                if index + 1 < len(groups) and self._is_faster(groups[index], groups[index + 1]):
                    has_kept = self._try(ranks, index, before) or has_kept
        return has_kept

    def _is_faster(self, first: NumberedGroup, second: NumberedGroup) -> bool:
        if len(first) + len(second) > self._most_members:
            return False
        operations = [self._timing.operations[number] for number in first + second]
        if len({op[1:] for op in operations}) < len(operations):  # direction, stage and micro-batch
            return False
        duration = self._timing.duration
        return duration(first + second) < duration(first) + duration(second) - 1e-12

    def _try(self, ranks: Sequence[int], index: int, before: TimingProgress) -> bool:
        """Fuses a pair on these ranks, given the progress before it, and returns whether the pair is kept."""
        old = {rank: self._ranks[rank] for rank in ranks}
        pair = old[ranks[0]][index], old[ranks[0]][index + 1]
        if pair in self._rejected:
            return False
        new = {rank: [*own[:index], own[index] + own[index + 1], *own[index + 2 :]] for rank, own in old.items()}
        if any(self._peak(groups) > self._caps[rank] + 1e-9 for rank, groups in new.items()):
            return False
        duration = self._timing.duration
        left = {rank: before.left[rank] for rank in ranks}
        for rank, (first, second) in ((rank, own[index : index + 2]) for rank, own in old.items()):
            self._ranks[rank] = new[rank]
            before.left[rank] -= duration(first) + duration(second) - duration(first + second)
        found = self._measure(before.copy(), self._best[0])
        if found <= self._best:
            self._best = found
            return True
        for rank in ranks:
            self._ranks[rank] = old[rank]
            before.left[rank] = left[rank]
        if self._is_large:
            self._rejected.add(pair)
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
        made = self._made
        freed = self._freed
        alive = peak = 0.0
        for group in groups:
            for number in group:
                alive += made[number]
            if alive > peak:
                peak = alive
            for number in group:
                alive -= freed[number]
        return peak


def _mirror_pairs(schedule: Schedule) -> list[tuple[int, ...]]:
    """Returns the pairs of mirror ranks, or each rank if their groups differ in more than the direction."""
    last = schedule.num_ranks - 1

    def is_mirror(group: Group, other: Group) -> bool:
        return sorted(group) == sorted(Operation(op.kind, 1 - op.direction, op.stage, op.micro_batch) for op in other)

    pairs = [(rank, last - rank) for rank in range(schedule.num_ranks // 2)]
    has_mirrors = schedule.num_directions == 2 and schedule.num_ranks % 2 == 0
    for rank, mirror in pairs if has_mirrors else ():
        own = schedule.ranks[rank]
        other = schedule.ranks[mirror]
        has_mirrors = has_mirrors and len(own) == len(other) and all(map(is_mirror, own, other))
    return [*pairs] if has_mirrors else [(rank,) for rank in range(schedule.num_ranks)]
