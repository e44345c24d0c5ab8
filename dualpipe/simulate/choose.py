"""Chooses the best schedule by simulation, and explains the choice."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dualpipe.draw.entry import TimedSchedule, UnavailableSchedule, number, time_schedule
from dualpipe.ir import MemoryCapError, Schedule, ScheduleError
from dualpipe.registry import build, candidates
from dualpipe.simulate.costs import CostModel

CostsOf = Callable[[int], CostModel]
"""Function from the number of stages to their costs."""


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
    """Times every kind of schedule that may be chosen, or gives the reason why it is not available.

    Args:
        num_ranks: ranks of one pipeline.
        num_micro_batches: micro-batches of one pipeline and step, of both directions together.
        costs_of: costs of each stage, as a function of the number of stages.
        memory_cap: maximum of a rank's live activations; None for each schedule's own.
        cache_dir: folder that caches searched schedules.
        excluded: kinds that must not be chosen, with reasons.
        chunks: stages of a rank for one direction; None for the best number.
        most_stages: maximum number of stages; None for no maximum.

    Raises:
        MemoryCapError: if no schedule fits the cap.
    """
    rows: list[TimedSchedule | UnavailableSchedule] = []
    least = math.inf
    for kind, spec in candidates().items():
        if excluded and kind in excluded:
            rows.append(UnavailableSchedule(kind=kind, reason=excluded[kind]))
            continue
        tried: list[TimedSchedule] = []
        try:
            for number in spec.chunk_choices(chunks):
                costs = costs_of(spec.num_stages(num_ranks, number))
                if tried and len(costs.stages) > (most_stages or math.inf):
                    break
                schedule = build(kind, num_ranks, num_micro_batches, costs, memory_cap, cache_dir)
                tried.append(time_schedule(schedule, costs, memory_cap))
        except ScheduleError as error:
            if isinstance(error, MemoryCapError):
                least = min(least, error.least)
            reason = str(error)
        rows.append(min(tried, key=_rank) if tried else UnavailableSchedule(kind=kind, reason=reason))
    if memory_cap is not None and all(isinstance(row, UnavailableSchedule) for row in rows) and math.isfinite(least):
        raise MemoryCapError(
            f"no schedule of {num_ranks} ranks fits the cap, which is {memory_cap:g}; nearest: {least:g}",
            least,
        )
    return tuple(rows)


def choose(rows: Sequence[TimedSchedule | UnavailableSchedule], memory_cap: float | None = None) -> Choice:
    """Returns the schedule with the shortest makespan; of equal ones, that with the lowest peak memory.

    Raises:
        ScheduleError: if none is available.
    """
    entries = [row for row in rows if isinstance(row, TimedSchedule)]
    if not entries:
        reasons = "; ".join(f"{row.kind}: {row.reason}" for row in rows if isinstance(row, UnavailableSchedule))
        raise ScheduleError(f"schedule: no kind is available: {reasons}")
    ranked = sorted(entries, key=_rank)
    return Choice(schedule=ranked[0].schedule, reason=_reason(ranked, memory_cap), rows=tuple(rows))


def _rank(row: TimedSchedule) -> tuple[float, float]:
    return round(row.simulation.makespan, 9), row.peak


def _reason(ranked: Sequence[TimedSchedule], memory_cap: float | None) -> str:
    best = ranked[0]
    words = f"{best.schedule.kind}: makespan {number(best.simulation.makespan)}"
    if len(ranked) > 1:
        second = ranked[1]
        more = second.simulation.makespan / best.simulation.makespan - 1 if best.simulation.makespan else 0.0
        words += f", then {second.schedule.kind} with {number(second.simulation.makespan)} ({100 * more:.1f} % more"
        words += f", peak {number(second.peak)})" if more < 1e-9 else ")"
    words += f"; it keeps {number(best.peak)} activations of model/P"
    words += "" if memory_cap is None else f" of the {memory_cap:g} allowed"
    above = best.above_bound
    return words + (f"; {number(above)} above the lower bound" if above > 1e-9 else "; no schedule is shorter")
