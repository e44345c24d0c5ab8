"""Transforms schedules with pure functions: split, order, fuse, move weight gradients, offload.

Offload follows arXiv:2503.01328.
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from itertools import accumulate

from dualpipe.costs import CostModel
from dualpipe.ir import Group, Op, Operation, Schedule
from dualpipe.simulation import NumberedGroup, Timing, TimingProgress, peak_memory, simulate

_ROUNDING = 1e-9

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
_MAX_SWEEPS = 6
# Groups of two first: groups of three are then only formed where they help, so they never make a schedule longer.
_FUSED_SIZES = (2, 3)
# Maximum number of ranks for which every pair of groups is tried in every sweep.
_MOST_THOROUGH_RANKS = 16
_MAX_OFFLOAD_ROUNDS = 3


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


def merge_backwards(schedule: Schedule) -> Schedule:
    """Replaces every I by a full B and drops the W, for modules that cannot split their backward."""
    return replace(schedule, ranks=tuple(_merge(groups) for groups in schedule.ranks))


def _merge(groups: tuple[Group, ...]) -> tuple[Group, ...]:
    merged = (tuple(op for op in group if op.kind is not Op.BACKWARD_WEIGHT) for group in groups)
    backward = {Op.BACKWARD_INPUT: Op.BACKWARD}
    return tuple(tuple(op.with_kind(backward.get(op.kind, op.kind)) for op in group) for group in merged if group)


def _forwards(groups: tuple[Group, ...]) -> tuple[Group, ...]:
    forwards = (tuple(op for op in group if op.kind is Op.FORWARD) for group in groups)
    return tuple(group for group in forwards if group)


def _split(groups: tuple[Group, ...]) -> tuple[Group, ...]:
    split: list[Group] = []
    for group in groups:
        backwards = [op for op in group if op.kind is Op.BACKWARD]
        split.append(tuple(op.with_kind(Op.BACKWARD_INPUT) if op.kind is Op.BACKWARD else op for op in group))
        split += [(op.with_kind(Op.BACKWARD_WEIGHT),) for op in backwards]
    return tuple(split)


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
        self._placed: list[list[Group]] = [[] for _ in bare]
        self._ends = [-1.0] * len(self._timing.operations)
        self._blocked: dict[int, int] = {}
        self._events = [(0.0, rank) for rank in range(len(bare))]

    def run(self) -> tuple[tuple[Group, ...], ...] | None:
        while self._events:
            time, rank = heappop(self._events)
            self._clock[rank] = time
            self._step(rank)
        unfinished = any(at < len(groups) for at, groups in zip(self._next, self._groups, strict=True))
        return None if unfinished else tuple(map(tuple, self._placed))

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
        self._placed[rank].append((op,))
        self._room[rank] += self._costs.stages[op.stage].activation
        heappush(self._events, (self._clock[rank] + self._costs.compute_of(op), rank))

    def _run(self, rank: int, group: NumberedGroup, start: float) -> None:
        operations = self._timing.operations
        end = start + self._timing.duration(group)
        self._next[rank] += 1
        self._placed[rank].append(tuple(operations[number] for number in group))
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
    others = (tuple(op for op in group if op.kind is not Op.BACKWARD_WEIGHT) for group in groups)
    return [group for group in others if group]


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
        self._most_members = _FUSED_SIZES[0]
        self._timing = Timing(schedule, costs)
        self._ranks = [self._timing.numbered(groups) for groups in schedule.ranks]
        weights = [(op.kind, costs.stages[op.stage].activation) for op in self._timing.operations]
        self._allocated = [weight if kind is Op.FORWARD else 0.0 for kind, weight in weights]
        self._freed = [weight if kind in (Op.BACKWARD, Op.BACKWARD_WEIGHT) else 0.0 for kind, weight in weights]
        self._caps = [self._peak(groups) for groups in self._ranks]
        # With many ranks, both ranks of a mirror pair change together, and no pair is tried twice for one size.
        self._is_large = schedule.num_ranks > _MOST_THOROUGH_RANKS
        self._moved = _mirror_pairs(schedule) if self._is_large else [(rank,) for rank in range(schedule.num_ranks)]
        self._rejected: set[tuple[NumberedGroup, NumberedGroup]] = set()
        start = self._timing.begin(self._ranks)
        self._best = self._measure(start, float("inf"))

    def climb(self) -> Schedule:
        for self._most_members in _FUSED_SIZES:
            self._rejected.clear()
            for _ in range(_MAX_SWEEPS):
                if not self._sweep():
                    break
        operations = self._timing.operations
        ranks = tuple(tuple(tuple(operations[n] for n in group) for group in groups) for groups in self._ranks)
        return replace(self._schedule, ranks=ranks)

    def _sweep(self) -> bool:
        has_improved = False
        before = self._timing.begin(self._ranks)
        for index in range(max(map(len, self._ranks))):
            self._timing.advance(self._ranks, before, until=index)
            for ranks in self._moved:
                groups = self._ranks[ranks[0]]
                if index + 1 < len(groups) and self._is_faster(groups[index], groups[index + 1]):
                    has_improved = self._try(ranks, index, before) or has_improved
        return has_improved

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
        new = {
            rank: [*rank_groups[:index], rank_groups[index] + rank_groups[index + 1], *rank_groups[index + 2 :]]
            for rank, rank_groups in old.items()
        }
        if any(self._peak(groups) > self._caps[rank] + 1e-9 for rank, groups in new.items()):
            return False
        duration = self._timing.duration
        left = {rank: before.left[rank] for rank in ranks}
        for rank, (first, second) in ((rank, rank_groups[index : index + 2]) for rank, rank_groups in old.items()):
            self._ranks[rank] = new[rank]
            before.left[rank] -= duration(first) + duration(second) - duration(first + second)
        timing = self._measure(before.copy(), self._best[0])
        if timing <= self._best:
            self._best = timing
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
        allocated = self._allocated
        freed = self._freed
        alive = peak = 0.0
        for group in groups:
            for number in group:
                alive += allocated[number]
            if alive > peak:
                peak = alive
            for number in group:
                alive -= freed[number]
        return peak


def _mirror_pairs(schedule: Schedule) -> list[tuple[int, ...]]:
    """Returns the pairs of mirror ranks, or each rank if their groups differ in more than the direction."""
    last = schedule.num_ranks - 1

    def is_mirror(group: Group, mirrored: Group) -> bool:
        return sorted(group) == sorted(
            Operation(op.kind, 1 - op.direction, op.stage, op.micro_batch) for op in mirrored
        )

    pairs = [(rank, last - rank) for rank in range(schedule.num_ranks // 2)]
    has_mirrors = schedule.num_directions == 2 and schedule.num_ranks % 2 == 0
    for rank, mirror in pairs if has_mirrors else ():
        groups = schedule.ranks[rank]
        mirrored = schedule.ranks[mirror]
        has_mirrors = has_mirrors and len(groups) == len(mirrored) and all(map(is_mirror, groups, mirrored))
    return [*pairs] if has_mirrors else [(rank,) for rank in range(schedule.num_ranks)]


def offload(schedule: Schedule, costs: CostModel, memory_cap: float) -> Schedule | None:
    """Offloads activations until every rank keeps the cap, or returns None if copies alone cannot keep it.

    The order stays, or only the W move to their I, whichever is faster. A rank that exceeds the cap in a group offloads
    the activation that it needs last, as long as its link can copy it out before the group and back before its
    backward. If no activation is in time, the rank waits for a copy.
    """
    early = replace(schedule, ranks=tuple(tuple(_early_weights(groups)) for groups in schedule.ranks))
    candidates = [_in_order(candidate, costs, memory_cap) for candidate in (schedule, early)]
    return min(
        (candidate for candidate in candidates if candidate is not None),
        key=lambda candidate: simulate(candidate, costs).makespan,
        default=None,
    )


def _early_weights(groups: Sequence[Group]) -> Iterator[Group]:
    """Yields the groups with each W right after its I: an activation stays on the device from I to W."""
    for group in groups:
        others = tuple(op for op in group if op.kind is not Op.BACKWARD_WEIGHT)
        if others:
            yield others
        yield from ((op.with_kind(Op.BACKWARD_WEIGHT),) for op in others if op.kind is Op.BACKWARD_INPUT)


def _in_order(schedule: Schedule, costs: CostModel, memory_cap: float) -> Schedule | None:
    best: Schedule | None = None
    best_makespan = float("inf")
    simulation = simulate(schedule, costs)
    for _ in range(_MAX_OFFLOAD_ROUNDS):
        ranks = []
        for rank, groups in enumerate(schedule.ranks):
            planned = best.ranks[rank] if best else groups
            spans = zip(planned, simulation.starts[rank], simulation.ends[rank], strict=True)
            times = [(start, end) for group, start, end in spans if not group[0].kind.is_copy]
            moved = _RankPlan(groups, times, costs, memory_cap).run()
            if moved is None:
                return best
            ranks.append(moved)
        planned_schedule = replace(schedule, ranks=tuple(ranks))
        simulation = simulate(planned_schedule, costs)
        if (
            max(peak_memory(planned_schedule, costs)) > memory_cap + _ROUNDING
            or simulation.makespan >= best_makespan - _ROUNDING
        ):
            return best
        # Waits for copies change the times of groups. Another round plans with these times.
        best = planned_schedule
        best_makespan = simulation.makespan
    return best


@dataclass(frozen=True, slots=True)
class _Activation:
    """Activation on one rank, with the numbers of its groups; `copy` is None if it must stay."""

    forward: Operation
    created: int
    used: int
    freed: int
    weight: float
    copy: float | None


@dataclass(frozen=True, slots=True)
class _Move:
    """Groups before which an activation is offloaded and reloaded, or limits for them."""

    out: int
    back: int


class _RankPlan:
    def __init__(
        self, groups: Sequence[Group], times: Sequence[tuple[float, float]], costs: CostModel, memory_cap: float
    ) -> None:
        self._groups = groups
        self._starts = [start for start, _ in times]
        self._ends = [end for _, end in times]
        self._cap = memory_cap + _ROUNDING
        self._activations = _activations(groups, costs)
        # Chosen activations, with the last group before which each must have left, and the first for its reload.
        self._chosen: dict[_Activation, _Move] = {}

    def run(self) -> tuple[Group, ...] | None:
        moves = self._moves()
        while full := [group for group, alive in enumerate(self._alive(moves)) if alive > self._cap]:
            if not self._choose(full[0]):
                return None
            moves = self._moves()
        return self._with_copies(moves)

    def _choose(self, full: int) -> bool:
        """Chooses one more activation to be away during a group: the one needed last that is in time."""
        live = [
            activation
            for activation in self._activations
            if activation.copy is not None and activation.created < full < activation.used
        ]
        live.sort(key=lambda activation: -activation.used)
        moves = self._moves()
        before = self._excess(moves, full)
        for activation in live:
            if activation not in self._chosen:
                self._chosen[activation] = _Move(activation.used, activation.created)
                if self._excess(self._moves(), full) < before - _ROUNDING:
                    return True
                del self._chosen[activation]
        for activation in live:
            if activation in moves and moves[activation].back <= full:
                self._chosen[activation] = replace(self._chosen[activation], back=full + 1)
                return True
        for activation in live:
            if activation not in moves or moves[activation].out > full:
                self._chosen[activation] = _Move(
                    full, self._chosen[activation].back if activation in self._chosen else full + 1
                )
                return True
        return False

    def _moves(self) -> dict[_Activation, _Move]:
        """Returns the copies of the chosen activations: each out as early and back as late as the link allows."""
        outs: dict[_Activation, int] = {}
        free = 0.0
        for activation in sorted(
            self._chosen,
            key=lambda activation: (activation.created, self._groups[activation.created].index(activation.forward)),
        ):
            assert activation.copy is not None
            free = max(free, self._ends[activation.created]) + activation.copy
            # The first group that starts when the copy has ended, or the one that waits for it.
            in_time = bisect_right(self._ends, free - _ROUNDING) + 1
            outs[activation] = min(max(in_time, activation.created + 1), self._chosen[activation].out)
        moves: dict[_Activation, _Move] = {}
        limit = float("inf")
        for activation in sorted(self._chosen, key=lambda activation: -activation.used):
            assert activation.copy is not None
            limit = min(limit, self._starts[activation.used]) - activation.copy
            # The last group before which the copy can start in time.
            in_time = bisect_right(self._ends, limit + _ROUNDING)
            moves[activation] = _Move(
                outs[activation],
                min(max(in_time, outs[activation] + 1, self._chosen[activation].back), activation.used),
            )
        return {activation: move for activation, move in moves.items() if move.out < move.back}

    def _alive(self, moves: dict[_Activation, _Move]) -> list[float]:
        changes = [0.0] * (len(self._groups) + 1)
        for activation in self._activations:
            changes[activation.created] += activation.weight
            changes[activation.freed + 1] -= activation.weight
            if activation in moves:
                changes[moves[activation].out] -= activation.weight
                changes[moves[activation].back] += activation.weight
        return list(accumulate(changes[:-1]))

    def _excess(self, moves: dict[_Activation, _Move], until: int) -> float:
        return sum(max(0.0, alive - self._cap) for alive in self._alive(moves)[: until + 1])

    def _with_copies(self, moves: dict[_Activation, _Move]) -> tuple[Group, ...]:
        all_groups: list[Group] = []
        for index, group in enumerate(self._groups):
            # Offloads first, so that the reloads do not raise the peak.
            all_groups += _copies(
                Op.OFFLOAD, (activation.forward for activation, move in moves.items() if move.out == index)
            )
            ordered = sorted(
                (activation for activation, move in moves.items() if move.back == index),
                key=lambda activation: activation.used,
            )
            all_groups += _copies(Op.RELOAD, (activation.forward for activation in ordered))
            all_groups.append(group)
        return tuple(all_groups)


def _copies(kind: Op, forwards: Iterable[Operation]) -> list[Group]:
    return [(forward.with_kind(kind),) for forward in forwards]


def _activations(groups: Sequence[Group], costs: CostModel) -> list[_Activation]:
    at = {op: index for index, group in enumerate(groups) for op in group}
    activations = []
    for op, index in at.items():
        if op.kind is not Op.FORWARD:
            continue
        used = at.get(op.with_kind(Op.BACKWARD), -1)
        freed = used
        if used < 0:
            used = at[op.with_kind(Op.BACKWARD_INPUT)]
            freed = at[op.with_kind(Op.BACKWARD_WEIGHT)]
        stage = costs.stages[op.stage]
        activations.append(_Activation(op, index, used, freed, stage.activation, stage.offload))
    return activations
