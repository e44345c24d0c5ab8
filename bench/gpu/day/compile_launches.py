"""Compiles every kernel under this machine's Triton, many at a time.

A compiler that ends its process loses the launches of that moment alone: they are compiled again, one at a time.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

from tests.kernels.catalogue import LAUNCHES
from tests.kernels.compiled_table import recorded_launches, row_of


def problems_of(index: int) -> list[str]:
    """Compiles a launch of the catalogue and returns the rules that it breaks."""
    return row_of(LAUNCHES[index]).broken_rules()


def compile_all(indices: Sequence[int], num_processes: int) -> dict[int, list[str]]:
    """Compiles launches and returns each one's problems.

    Args:
        num_processes: that compile at the same time; with one, a compiler that ends its process is a problem of the
            launch that it compiled.
    """
    found: dict[int, list[str]] = {}
    with ProcessPoolExecutor(num_processes) as pool:
        futures = {pool.submit(problems_of, index): index for index in indices}
        for future in as_completed(futures):
            index = futures[future]
            try:
                found[index] = future.result()
            except BrokenProcessPool:
                if len(indices) == 1:
                    found[index] = [f"{LAUNCHES[index].name}, {LAUNCHES[index].shape}: the compiler ended its process"]
    for index in set(indices) - found.keys():
        found |= compile_all([index], 1)
    return found


def main() -> int:
    """Compiles, and prints the problems; the exit code is 1 if there are any."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.day.compile_launches", description=__doc__)
    parser.add_argument("--only", default="", help="a part of the kernels' names")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    chosen = [LAUNCHES.index(launch) for launch in recorded_launches() if arguments.only in launch.name]
    problems = [problem for listed in compile_all(chosen, arguments.processes).values() for problem in listed]
    print(*problems, f"{len(chosen)} kernels compiled, {len(problems)} problems", sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
