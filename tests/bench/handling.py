"""Measures the CPU time of what happens to every schedule of a run: `python -m tests.bench.handling`."""

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from dualpipe.ir import Schedule, from_json, to_json
from dualpipe.passes import forward_only
from dualpipe.registry import build
from dualpipe.runtime.compile import compile_rank
from dualpipe.runtime.pairing import overlapped
from dualpipe.runtime.protocols import Lane
from dualpipe.simulate.costs import Costs
from dualpipe.simulate.simulate import simulate
from dualpipe.validate import validate

_T = TypeVar("_T")
_COSTS = Costs(forward=1.0, backward_input=1.0, backward_weight=1.0, exchange=1.0, latency=0.0)
_LANES: tuple[Lane, ...] = ("compute", "comm", "compute", "comm")
SIZES = ((16, 120), (32, 1024))
KINDS = ("dualpipe", "zb_v")


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


def main() -> None:
    """Prints a row for every kind and size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", default=list(KINDS))
    for kind in parser.parse_args().kinds:
        for size in SIZES:
            seconds, schedule = cpu_seconds(lambda kind=kind, size=size: build(kind, *size))  # type: ignore[misc]
            count = sum(len(group) for groups in schedule.ranks for group in groups)
            parts = [("build", seconds), *handling_seconds(schedule)]
            shown = ", ".join(f"{name} {value:.3f} s" for name, value in parts)
            print(f"{kind} {size}, {count:,} operations: {shown}", flush=True)


if __name__ == "__main__":
    main()
