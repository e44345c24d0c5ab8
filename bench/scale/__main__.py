"""Measures what start-up costs in jobs of given sizes: `python -m bench.scale 2048 16384 100352`."""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.scale import groups, rendezvous, watchdog

Figures = Mapping[str, float]
"""Measured numbers by their names, which contain the unit."""

MEASUREMENTS: list[Callable[[int], Figures]] = [groups.measure, rendezvous.measure, watchdog.measure]
"""Functions that measure a job of a given number of ranks in this process. Each has its own names of figures."""


LAWS: list[Callable[[int, dict[str, float]], Sequence[str]]] = [rendezvous.broken_laws, watchdog.broken_laws]
"""Functions that return the limits that the figures of a job of a given number of ranks exceed, one line each."""


def main() -> int:
    """Runs all measurements for each size, and prints one table. Returns 1 if a figure exceeds its limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("num_ranks", type=int, nargs="+")
    sizes: list[int] = parser.parse_args().num_ranks
    columns: list[dict[str, float]] = []
    for num_ranks in sizes:
        began = time.perf_counter()
        figures: dict[str, Any] = {}
        for measure in MEASUREMENTS:
            figures |= measure(num_ranks)
        columns.append(figures)
        print(f"{num_ranks} ranks: measured in {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
    print(f"| what | {' | '.join(f'{num_ranks:,} ranks' for num_ranks in sizes)} |")
    print(f"| --- |{' ---: |' * len(sizes)}")
    for name in columns[0]:
        print(f"| {name} | {' | '.join(_number(column[name]) for column in columns)} |")
    broken = [line for size, column in zip(sizes, columns, strict=True) for law in LAWS for line in law(size, column)]
    print(*broken, sep="\n", end="\n" if broken else "", file=sys.stderr)
    return 1 if broken else 0


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3g}"


if __name__ == "__main__":
    sys.exit(main())
