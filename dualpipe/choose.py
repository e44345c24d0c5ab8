"""Times the registered schedules under given costs, chooses the best one, and explains the choice."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dualpipe.build import build
from dualpipe.draw.entry import TimedSchedule, UnavailableSchedule, number, time_schedule
from dualpipe.ir import MemoryCapError, Schedule, ScheduleError
from dualpipe.registry import SCHEDULES, candidates
from dualpipe.simulate.costs import CostModel, resampled
from dualpipe.simulate.simulate import simulate

MARGIN = 0.005
"""Fraction of the shortest makespan that `choose` gives up for less memory if the costs count weights."""

_MOST_SEARCHED = 256
"""Maximum of stages times micro-batches for which a run waits for a searched schedule: about 1 s."""

_ROUNDING = 1e-9

CostsOf = Callable[[str, int], CostModel]
"""Function from the kind of schedule and the number of stages to the costs of the stages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Chosen schedule, the reason for it, and all schedules that were considered."""

    schedule: Schedule
    reason: str
    rows: tuple[TimedSchedule | UnavailableSchedule, ...]


def survey(
    num_ranks: int,
    num_micro_batches: int,
    costs_of: CostsOf,
    memory_cap: float | None = None,
    cache_dir: Path | None = None,
    excluded: dict[str, str] | None = None,
    *,
    chunks: int | None = None,
    most_stages: int | None = None,
) -> tuple[TimedSchedule | UnavailableSchedule, ...]:
    """Times every kind of schedule that may be chosen, or gives the reason why it is not available."""
    rows: list[TimedSchedule | UnavailableSchedule] = []
    least = math.inf
    for kind in candidates():
        if excluded and kind in excluded:
            rows.append(UnavailableSchedule(kind=kind, reason=excluded[kind]))
            continue
        try:
            rows.append(
                best_of_kind(
                    kind, num_ranks, num_micro_batches, costs_of, memory_cap, cache_dir, chunks, most_stages=most_stages
                )
            )
        except ScheduleError as error:
            if isinstance(error, MemoryCapError):
                least = min(least, error.least)
            rows.append(UnavailableSchedule(kind=kind, reason=str(error)))
    if memory_cap is not None and all(isinstance(row, UnavailableSchedule) for row in rows) and math.isfinite(least):
        raise MemoryCapError(
            f"no schedule of {num_ranks} ranks fits the cap, which is {memory_cap:g}; nearest: {least:g}",
            least,
        )
    return tuple(rows)


def best_of_kind(
    kind: str,
    num_ranks: int,
    num_micro_batches: int,
    costs_of: CostsOf,
    memory_cap: float | None = None,
    cache_dir: Path | None = None,
    chunks: int | None = None,
    *,
    most_stages: int | None = None,
) -> TimedSchedule:
    """Times a kind of schedule with each possible number of chunks and returns the shortest.

    If the costs are those of slices and the kind does not take slices, it is timed with whole sequences.

    Args:
        memory_cap: as in `dualpipe.build.build`.
        most_stages: maximum number of stages, except for the smallest number of chunks; None for no maximum.

    Raises:
        ScheduleError: if the kind is not defined for the size or number of chunks, or does not fit the cap.
    """
    spec = SCHEDULES.get(kind)
    timed: list[TimedSchedule] = []
    errors: list[ScheduleError] = []
    for choice in spec.chunk_choices(chunks):
        num_stages = spec.num_stages(num_ranks, choice)
        if (timed or errors) and num_stages > (most_stages or math.inf):
            break
        costs = costs_of(kind, num_stages)
        count = num_micro_batches
        if costs.slices > 1 and not spec.takes_slices:
            count = num_micro_batches // costs.slices
            costs = costs.of_whole_sequences()
        try:
            schedule = build(kind, num_ranks, count, costs, memory_cap, cache_dir)
        except ScheduleError as error:
            errors.append(error)
        else:
            timed.append(time_schedule(schedule, costs, memory_cap))
    if not timed:
        raise min(errors, key=lambda error: error.least if isinstance(error, MemoryCapError) else math.inf)
    return min(timed, key=_order)


def choose(rows: Sequence[TimedSchedule | UnavailableSchedule], memory_cap: float | None = None) -> Choice:
    """Returns the schedule with the shortest makespan; of equal ones, that with the least memory.

    If the costs count weights, makespans within `MARGIN` of the shortest are equal: two directions hold the weights
    twice.
    """
    entries = [row for row in rows if isinstance(row, TimedSchedule)]
    if not entries:
        reasons = "; ".join(f"{row.kind}: {row.reason}" for row in rows if isinstance(row, UnavailableSchedule))
        raise ScheduleError(f"schedule: no kind is available: {reasons}")
    ranked = sorted(entries, key=_order)
    limit = ranked[0].simulation.makespan * (1 + MARGIN)
    near = [row for row in ranked if row.costs.weights and row.simulation.makespan <= limit] or ranked[:1]
    best = min(near, key=lambda row: (round(row.memory, 9), *_order(row)))
    return Choice(schedule=best.schedule, reason=_reason(best, ranked, memory_cap), rows=tuple(rows))


def _order(row: TimedSchedule) -> tuple[float, float]:
    return round(row.simulation.makespan, 9), row.memory


def _reason(best: TimedSchedule, ranked: Sequence[TimedSchedule], memory_cap: float | None) -> str:
    words = f"{_name(best)}: makespan {number(best.simulation.makespan)}"
    others = [row for row in ranked if row is not best]
    if others:
        words += f", {_compared(best, others[0])}"
    words += f"; it keeps {number(best.peak)} activations of model/P"
    if best.costs.weights:
        words += f" and {best.copies} x {number(best.costs.weights)} of weights, {number(best.memory)} together,"
    words += "" if memory_cap is None else f" of the {memory_cap:g} allowed"
    above = best.above_bound
    words = words.rstrip(",")
    return words + (
        f"; {number(above)} above the lower bound" if above > 1e-9 else "; no schedule with its placement is shorter"
    )


def _compared(best: TimedSchedule, other: TimedSchedule) -> str:
    mine = best.simulation.makespan
    its = other.simulation.makespan
    if its < mine - 1e-9:
        less = f"{100 * (1 - its / mine):.2f} % shorter"
        return f"{_name(other)} is {less} but needs {number(other.memory)} of memory, weights included"
    more = its / mine - 1 if mine else 0.0
    words = f"then {_name(other)} with {number(its)} ({100 * more:.1f} % more"
    return words + (f", peak {number(other.peak)})" if more < 1e-9 else ")")


def _name(row: TimedSchedule) -> str:
    """Returns the kind, with the number of chunks if it could be another."""
    kind = row.schedule.kind
    has_choice = kind in SCHEDULES and len(SCHEDULES.get(kind).chunks) > 1
    return f"{kind} with {row.chunks} chunk{'s' * (row.chunks != 1)}" if has_choice else kind


class Alternatives:
    """Other schedules of a run's size. Each is made once and timed under the costs of every picture."""

    def __init__(
        self,
        excluded: Mapping[str, str],
        change: Callable[[Schedule], Schedule] | None = None,
        most_stages: int | None = None,
    ) -> None:
        """Stores excluded kinds with reasons; `change` is what the run does to its schedule."""
        self._excluded = excluded
        self._change = change
        self._most_stages = math.inf if most_stages is None else most_stages
        self._made: dict[str, Schedule | UnavailableSchedule] = {}

    def timed(self, schedule: Schedule, costs: CostModel) -> list[TimedSchedule | UnavailableSchedule]:
        """Times every other kind, with its best number of chunks of the first call, or says why it cannot."""
        rows: list[TimedSchedule | UnavailableSchedule] = []
        for kind in candidates():
            if kind == schedule.kind:
                continue
            made = self._made.get(kind)
            if made is None:
                made = self._made[kind] = self._make(kind, schedule, costs)
            if isinstance(made, Schedule):
                rows.append(time_schedule(made, resampled(costs, made.num_stages)))
            else:
                rows.append(made)
        return rows

    def _make(self, kind: str, schedule: Schedule, costs: CostModel) -> Schedule | UnavailableSchedule:
        num_ranks = schedule.num_ranks
        num_micro_batches = schedule.num_micro_batches
        spec = candidates()[kind]
        if kind in self._excluded:
            return UnavailableSchedule(kind=kind, reason=self._excluded[kind])
        hint = f"num_ranks={num_ranks} num_micro_batches={num_micro_batches}"
        reason = f"its search takes too long during a run; see python -m launch.schedule {hint}"
        best: Schedule | None = None
        shortest = math.inf
        for chunks in spec.chunk_choices(None):
            num_stages = spec.num_stages(num_ranks, chunks)
            if spec.takes_costs and num_stages * num_micro_batches > _MOST_SEARCHED:
                break
            if chunks > spec.chunks[0] and num_stages > self._most_stages:
                break
            try:
                own_costs = resampled(costs, num_stages)
                made = build(kind, num_ranks, num_micro_batches, own_costs)
            except ScheduleError as error:
                reason = str(error)
                continue
            made = made if self._change is None else self._change(made)
            makespan = simulate(made, own_costs).makespan
            if makespan < shortest * (1 - _ROUNDING):
                best = made
                shortest = makespan
        return best or UnavailableSchedule(kind=kind, reason=reason)


def by_makespan(rows: list[TimedSchedule | UnavailableSchedule]) -> list[TimedSchedule | UnavailableSchedule]:
    """Returns the rows sorted by makespan, unavailable schedules last."""
    timed = [row for row in rows if isinstance(row, TimedSchedule)]
    others = [row for row in rows if isinstance(row, UnavailableSchedule)]
    return [*sorted(timed, key=lambda row: (row.simulation.makespan, row.peak)), *others]
