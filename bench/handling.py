"""Measures the CPU time of what happens to every schedule of a run: `python -m bench.handling`.

With `--builds` it measures how long orders take to build that depend on the costs, for equal and uneven stages.
"""

import argparse
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from bench.schedules import Case, most_work
from dualpipe.builder import build_schedule
from dualpipe.costs import Costs
from dualpipe.ir import Schedule, from_json, to_json
from dualpipe.passes import forward_only
from dualpipe.registry import SCHEDULES
from dualpipe.runtime.compile import compile_rank
from dualpipe.runtime.pairing import overlapped
from dualpipe.runtime.program import Lane
from dualpipe.simulation import makespan_of, simulate
from dualpipe.validate import validate

_T = TypeVar("_T")
_COSTS = Costs(forward=1.0, backward_input=1.0, backward_weight=1.0, exchange=1.0, latency=0.0)
_LANES: tuple[Lane, ...] = ("compute", "comm", "compute", "comm")
SIZES = ((16, 120), (32, 1024))
KINDS = ("dualpipe", "zb_v")
EXCHANGES = (0.0, 0.65, 1.0)


def cpu_seconds(function: Callable[[], _T]) -> tuple[float, _T]:
    """Returns the CPU time of a call, and its result."""
    gc.collect()
    started = time.process_time()
    result = function()
    return time.process_time() - started, result


def handling_seconds(schedule: Schedule) -> Iterator[tuple[str, float]]:
    """Yields what is done with a schedule, and its CPU time in seconds."""
    forwards = forward_only(schedule)
    seconds, text = cpu_seconds(lambda: to_json(schedule))
    yield "to JSON", seconds
    yield "from JSON", cpu_seconds(lambda: from_json(text))[0]
    yield "validate", cpu_seconds(lambda: validate(schedule))[0]
    yield "validate forwards", cpu_seconds(lambda: validate(forwards, forward_only=True))[0]
    yield "simulate", cpu_seconds(lambda: simulate(schedule, _COSTS))[0]
    lanes = dict.fromkeys(range(schedule.num_stages), _LANES)
    yield "compile one rank", cpu_seconds(lambda: compile_rank(schedule, 0, lanes, overlapped))[0]


def build_row(kind: str, chunks: int, size: tuple[int, int], exchange: float) -> str:
    """Returns the CPU seconds to build a schedule and its overhead, for equal stages and for uneven ones."""
    texts = []
    for first, last in ((0.0, 0.0), (-0.3, 0.5)):
        case = Case(num_ranks=size[0], num_micro_batches=size[1], exchange=exchange, first=first, last=last)
        costs = case.costs_of(SCHEDULES.get(kind).num_stages(size[0], chunks))
        seconds, schedule = cpu_seconds(lambda costs=costs: build_schedule(kind, *size, costs))  # type: ignore[misc]
        overhead = makespan_of(schedule, costs) - most_work(schedule, costs)
        texts.append(f"{seconds:.2f} s, overhead {overhead:.4g}")
    return f"{kind} {chunks} {size}, x {exchange:g}: equal stages {texts[0]}; uneven {texts[1]}"


def _print_builds(chunks: Sequence[int], sizes: Sequence[tuple[int, int]]) -> None:
    rows = [("dualpipe_split", 1), *(("dualpipe_interleaved", number) for number in chunks)]
    for size in sizes:
        for kind, number in rows:
            for exchange in EXCHANGES:
                print(build_row(kind, number, size, exchange), flush=True)


def _print_handling(kinds: Sequence[str], sizes: Sequence[tuple[int, int]]) -> None:
    for kind in kinds:
        for size in sizes:
            seconds, schedule = cpu_seconds(lambda kind=kind, size=size: build_schedule(kind, *size))  # type: ignore[misc]
            count = sum(len(group) for groups in schedule.ranks for group in groups)
            parts = [("build", seconds), *handling_seconds(schedule)]
            shown = ", ".join(f"{name} {value:.3f} s" for name, value in parts)
            print(f"{kind} {size}, {count:,} operations: {shown}", flush=True)


def main() -> None:
    """Prints a row for every kind and size."""
    parser = argparse.ArgumentParser(prog="python -m bench.handling", description=__doc__)
    parser.add_argument("kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--builds", action="store_true", help="measure the time to build orders for costs")
    parser.add_argument("--chunks", nargs="+", type=int, default=[1, 2], help="of dualpipe_interleaved")
    parser.add_argument("--size", nargs=2, type=int, metavar=("RANKS", "MICRO_BATCHES"), help="instead of both sizes")
    arguments = parser.parse_args()
    sizes = [(arguments.size[0], arguments.size[1])] if arguments.size else list(SIZES)
    if arguments.builds:
        _print_builds(arguments.chunks, sizes)
    else:
        _print_handling(arguments.kinds, sizes)


if __name__ == "__main__":
    main()
