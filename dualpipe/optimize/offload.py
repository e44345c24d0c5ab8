"""Decides which activations a schedule offloads to host memory for a memory cap (arXiv:2503.01328)."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from dualpipe.ir import Group, Op, Operation, Schedule
from dualpipe.passes import _ROUNDING
from dualpipe.simulate.costs import CostModel
from dualpipe.simulate.simulate import peak_memory, simulate

_MAX_ROUNDS = 3


def offload(schedule: Schedule, costs: CostModel, memory_cap: float) -> Schedule | None:
    """Offloads activations until every rank keeps the cap, or returns None if copies alone cannot keep it.

    The order stays, or only the W move to their I, whichever is faster. A rank that exceeds the cap in a group offloads
    the activation that it needs last, as long as its link can copy it out before the group and back before its
    backward. If no activation is in time, the rank waits for a copy.
    """
    early = replace(schedule, ranks=tuple(tuple(_early_weights(groups)) for groups in schedule.ranks))
    found = [_in_order(each, costs, memory_cap) for each in (schedule, early)]
    return min(
        (each for each in found if each is not None), key=lambda each: simulate(each, costs).makespan, default=None
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
    for _ in range(_MAX_ROUNDS):
        ranks = []
        for rank, groups in enumerate(schedule.ranks):
            planned = best.ranks[rank] if best else groups
            spans = zip(planned, simulation.starts[rank], simulation.ends[rank], strict=True)
            times = [(start, end) for group, start, end in spans if not group[0].kind.is_copy]
            moved = _RankPlan(groups, times, costs, memory_cap).run()
            if moved is None:
                return best
            ranks.append(moved)
        found = replace(schedule, ranks=tuple(ranks))
        simulation = simulate(found, costs)
        if max(peak_memory(found, costs)) > memory_cap + _ROUNDING or simulation.makespan >= best_makespan - _ROUNDING:
            return best
        # Waits for copies change the times of groups. Another round plans with these times.
        best = found
        best_makespan = simulation.makespan
    return best


@dataclass(frozen=True, slots=True)
class _Activation:
    """Activation on one rank, with the numbers of its groups; `copy` is None if it must stay."""

    forward: Operation
    made: int
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
        live = [each for each in self._activations if each.copy is not None and each.made < full < each.used]
        live.sort(key=lambda each: -each.used)
        moves = self._moves()
        before = self._excess(moves, full)
        for each in live:
            if each not in self._chosen:
                self._chosen[each] = _Move(each.used, each.made)
                if self._excess(self._moves(), full) < before - _ROUNDING:
                    return True
                del self._chosen[each]
        for each in live:
            if each in moves and moves[each].back <= full:
                self._chosen[each] = replace(self._chosen[each], back=full + 1)
                return True
        for each in live:
            if each not in moves or moves[each].out > full:
                self._chosen[each] = _Move(full, self._chosen[each].back if each in self._chosen else full + 1)
                return True
        return False

    def _moves(self) -> dict[_Activation, _Move]:
        """Returns the copies of the chosen activations: each out as early and back as late as the link allows."""
        outs: dict[_Activation, int] = {}
        free = 0.0
        for each in sorted(self._chosen, key=lambda each: (each.made, self._groups[each.made].index(each.forward))):
            assert each.copy is not None
            free = max(free, self._ends[each.made]) + each.copy
            # The first group that starts when the copy has ended, or the one that waits for it.
            in_time = bisect_right(self._ends, free - _ROUNDING) + 1
            outs[each] = min(max(in_time, each.made + 1), self._chosen[each].out)
        moves: dict[_Activation, _Move] = {}
        limit = float("inf")
        for each in sorted(self._chosen, key=lambda each: -each.used):
            assert each.copy is not None
            limit = min(limit, self._starts[each.used]) - each.copy
            # The last group before which the copy can start in time.
            in_time = bisect_right(self._ends, limit + _ROUNDING)
            moves[each] = _Move(outs[each], min(max(in_time, outs[each] + 1, self._chosen[each].back), each.used))
        return {each: move for each, move in moves.items() if move.out < move.back}

    def _alive(self, moves: dict[_Activation, _Move]) -> list[float]:
        changes = [0.0] * (len(self._groups) + 1)
        for each in self._activations:
            changes[each.made] += each.weight
            changes[each.freed + 1] -= each.weight
            if each in moves:
                changes[moves[each].out] -= each.weight
                changes[moves[each].back] += each.weight
        return list(accumulate(changes[:-1]))

    def _excess(self, moves: dict[_Activation, _Move], until: int) -> float:
        return sum(max(0.0, alive - self._cap) for alive in self._alive(moves)[: until + 1])

    def _with_copies(self, moves: dict[_Activation, _Move]) -> tuple[Group, ...]:
        made: list[Group] = []
        for index, group in enumerate(self._groups):
            # Offloads first, so that the reloads do not raise the peak.
            made += _copies(Op.OFFLOAD, (each.forward for each, move in moves.items() if move.out == index))
            ordered = sorted((each for each, move in moves.items() if move.back == index), key=lambda each: each.used)
            made += _copies(Op.RELOAD, (each.forward for each in ordered))
            made.append(group)
        return tuple(made)


def _copies(kind: Op, forwards: Iterable[Operation]) -> list[Group]:
    return [(forward.with_kind(kind),) for forward in forwards]


def _activations(groups: Sequence[Group], costs: CostModel) -> list[_Activation]:
    at = {op: index for index, group in enumerate(groups) for op in group}
    found = []
    for op, index in at.items():
        if op.kind is not Op.FORWARD:
            continue
        used = at.get(op.with_kind(Op.BACKWARD), -1)
        freed = used
        if used < 0:
            used = at[op.with_kind(Op.BACKWARD_INPUT)]
            freed = at[op.with_kind(Op.BACKWARD_WEIGHT)]
        stage = costs.stages[op.stage]
        found.append(_Activation(op, index, used, freed, stage.activation, stage.offload))
    return found
