"""Compares every kind of schedule with targets and lower bounds: `python -m bench.schedules`.

Each case is a size with costs. For every kind and number of chunks the table has the overhead (makespan minus the work
of the busiest rank), the peak of live activations, and the overhead that no schedule of that placement can beat.
Makespans and peaks come from `tests.dualpipe.event_clock`, which shares no code with the simulator, and every schedule
is validated. A kind that orders by cost is built within the memory cap. `--stretch` allows 1.5 P activations instead of
P + 2.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dualpipe.bounds import lower_bound
from dualpipe.builder import build_schedule
from dualpipe.costs import CostModel, Costs, StageCosts, resampled, uniform
from dualpipe.ir import Schedule, ScheduleError
from dualpipe.registry import AUTO_CHUNKS, SCHEDULES
from dualpipe.validate import validate
from tests.dualpipe.event_clock import EventClock

_ROUNDING = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A size with costs of model/P, and the overheads to compare with.

    Attributes:
        first: added to F, I and W of the first of P stages.
        last: added to F, I and W of the last of P stages.
        target: overhead to reach at a peak of P + 2 activations, or None.
        stretch: overhead to reach at a peak of 1.5 P activations, or None.
        before: overhead of `dualpipe_split` before there were several chunks and groups of three.
    """

    num_ranks: int
    num_micro_batches: int
    times: tuple[float, float, float] = (1.0, 1.0, 1.0)
    exchange: float = 0.0
    latency: float = 0.0
    first: float = 0.0
    last: float = 0.0
    most_chunks: int = AUTO_CHUNKS
    target: float | None = None
    stretch: float | None = None
    before: float | None = None

    def __str__(self) -> str:
        """Returns size and costs, as in `8, 32, 1:1:1, x 0.5, latency 0`."""
        times = ":".join(f"{value:g}" for value in self.times)
        text = f"{self.num_ranks}, {self.num_micro_batches}, {times}, x {self.exchange:g}, latency {self.latency:g}"
        text += f", first stage {self.first:+g}" if self.first else ""
        text += f", last stage {self.last:+g}" if self.last else ""
        return text + (", one chunk" if self.most_chunks == 1 else "")

    def costs_of(self, num_stages: int) -> CostModel:
        """Returns the costs of every stage if the model is cut into `num_stages`."""
        forward, backward_input, backward_weight = self.times
        costs = Costs(
            forward=forward,
            backward_input=backward_input,
            backward_weight=backward_weight,
            exchange=self.exchange,
            latency=self.latency,
        )
        if not self.first and not self.last:
            return uniform(costs, self.num_ranks, num_stages)
        equal = uniform(costs, self.num_ranks, self.num_ranks)
        first, *between, last = equal.stages
        stages = (_longer(first, self.first), *between, _longer(last, self.last))
        return resampled(replace(equal, stages=stages), num_stages)


def _longer(stage: StageCosts, time: float) -> StageCosts:
    return replace(
        stage,
        forward=stage.forward + time,
        backward_input=stage.backward_input + time,
        backward_weight=stage.backward_weight + time,
    )


_LONG_INPUT = (1.0, 1.3, 0.7)

TARGETS = (
    Case(num_ranks=8, num_micro_batches=32, target=0.75, before=3),
    Case(num_ranks=16, num_micro_batches=64, target=1.75, before=7),
    Case(num_ranks=8, num_micro_batches=32, exchange=0.5, target=6, stretch=4, before=11.5),
    Case(num_ranks=8, num_micro_batches=32, exchange=1, target=12, stretch=9, before=20),
    Case(num_ranks=16, num_micro_batches=64, exchange=1, target=32, stretch=24, before=44),
    Case(num_ranks=8, num_micro_batches=32, exchange=1.5, target=30, stretch=24, before=50),
    Case(num_ranks=8, num_micro_batches=32, times=_LONG_INPUT, exchange=1, target=13, stretch=10, before=24.2),
    Case(num_ranks=8, num_micro_batches=32, exchange=1, latency=0.1, target=15, before=22),
    Case(num_ranks=4, num_micro_batches=16, exchange=1.5, most_chunks=1, target=16, before=22),
    Case(num_ranks=4, num_micro_batches=32, exchange=1.5, most_chunks=1, target=16, before=30),
    Case(num_ranks=8, num_micro_batches=32, exchange=1.5, most_chunks=1, target=38, before=50),
)
"""Cases with a target."""

GRID = (
    Case(num_ranks=8, num_micro_batches=32, before=3.0),
    Case(num_ranks=8, num_micro_batches=32, exchange=0.5, before=11.5),
    Case(num_ranks=8, num_micro_batches=32, exchange=1, before=20),
    Case(num_ranks=8, num_micro_batches=32, exchange=1.5, before=50),
    Case(num_ranks=8, num_micro_batches=32, times=_LONG_INPUT, before=3.9),
    Case(num_ranks=8, num_micro_batches=32, times=_LONG_INPUT, exchange=1, before=24.2),
    Case(num_ranks=8, num_micro_batches=32, exchange=1, latency=0.1, before=22),
    Case(num_ranks=8, num_micro_batches=32, exchange=1, latency=0.3, before=26),
    Case(num_ranks=8, num_micro_batches=32, first=-0.3, last=0.5, before=1.8),
    Case(num_ranks=8, num_micro_batches=32, times=_LONG_INPUT, exchange=1, latency=0.05, last=1, before=15.4),
)
"""Cases of a grid in which no case may get longer than `before`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Schedule of a case, as timed by the event clock. `bound` is an overhead; `seconds` is the time to build it."""

    kind: str
    chunks: int
    overhead: float
    peak: float
    bound: float
    seconds: float


def found_schedules(case: Case, kinds: Sequence[str], chunks: Sequence[int], cap: float) -> Iterator[Found | str]:
    """Yields every kind with every number of chunks that keeps the cap, or a line that says why there is none."""
    for kind in kinds:
        for number in chunks:
            if number not in SCHEDULES.get(kind).chunks or number > case.most_chunks:
                continue
            try:
                yield _found(case, kind, number, cap)
            except ScheduleError as error:
                yield f"{kind} {number}: {error}"


def _found(case: Case, kind: str, chunks: int, cap: float) -> Found:
    costs = case.costs_of(SCHEDULES.get(kind).num_stages(case.num_ranks, chunks))
    begin = time.perf_counter()
    schedule = build_schedule(kind, case.num_ranks, case.num_micro_batches, costs, cap)
    seconds = time.perf_counter() - begin
    validate(schedule, cap)
    played, work = EventClock(schedule, costs), most_work(schedule, costs)
    bound = lower_bound(schedule, costs, cap).value
    assert bound <= played.makespan + _ROUNDING, f"{case}: {kind} has makespan {played.makespan}, bound {bound}"
    return Found(
        kind=kind,
        chunks=chunks,
        overhead=played.makespan - work,
        peak=max(played.peaks),
        bound=bound - work,
        seconds=seconds,
    )


def most_work(schedule: Schedule, costs: CostModel) -> float:
    return max(sum(costs.compute_of(op) for group in groups for op in group) for groups in schedule.ranks)


def _compare(case: Case, arguments: argparse.Namespace) -> tuple[str, ...]:
    """Prints the schedules of a case and returns its row of the summary."""
    cap = 1.5 * case.num_ranks if arguments.stretch else case.num_ranks + 2.0
    aim = case.stretch if arguments.stretch else case.target
    print(f"\n{case}; peak of at most {cap:g}", flush=True)
    best: Found | None = None
    for found in found_schedules(case, arguments.kinds, arguments.chunks, cap):
        if isinstance(found, str):
            print(f"  {found}", flush=True)
            continue
        numbers = f"{found.overhead:8.2f}  peak {found.peak:6.2f}  bound {found.bound:7.2f}  {found.seconds:6.1f} s"
        print(f"  {found.kind:21} {found.chunks}  {numbers}", flush=True)
        if best is None or (found.overhead, found.peak) < (best.overhead - _ROUNDING, best.peak):
            best = found
    before = "" if case.before is None else f"{case.before:g}"
    if best is None:
        return (str(case), before, "none", "", "", "", "" if aim is None else f"{aim:g}", "")
    name = f"{best.kind}, {best.chunks}"
    numbers = tuple(f"{value:.4g}" for value in (best.overhead, best.peak, best.bound))  # type: ignore[assignment]
    # Cases without a target must not get longer than before.
    limit = case.before if aim is None else aim
    verdict = "" if limit is None else "reached" if best.overhead <= limit + _ROUNDING else "missed"
    return (str(case), before, name, *numbers, "" if aim is None else f"{aim:g}", verdict)


_HEADER = ("P, M, F:I:W, exchange x, latency", "before", "best, chunks", "overhead", "peak", "bound", "target", "")


def main() -> None:
    """Prints the schedules of every case, and a summary as a Markdown table."""
    arguments = _arguments()
    cases = {"targets": TARGETS, "grid": GRID, "all": TARGETS + GRID}[arguments.table]
    picked = [cases[index] for index in arguments.cases or range(len(cases))]
    rows = [_compare(case, arguments) for case in picked]
    table = "\n".join("| " + " | ".join(row) + " |" for row in (_HEADER, ("---",) * len(_HEADER), *rows))
    print("\n" + table)
    if arguments.out:
        arguments.out.write_text(table + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.schedules", description=__doc__)
    parser.add_argument("--table", choices=("targets", "grid", "all"), default="targets")
    parser.add_argument("--cases", nargs="+", type=int, help="indices of cases, from 0; all by default")
    parser.add_argument("--kinds", nargs="+", choices=SCHEDULES.names(), default=list(SCHEDULES.names()))
    parser.add_argument("--chunks", nargs="+", type=int, default=list(range(1, AUTO_CHUNKS + 1)))
    parser.add_argument("--stretch", action="store_true", help="allow 1.5 P activations, and compare with the stretch")
    parser.add_argument("--out", type=Path, help="also write the summary to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
