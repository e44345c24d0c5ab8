"""Shows that YaRN extends a context by 8: `python -m tests.needle` trains three small models from random weights.

Each seed trains a base at length 128, extends it to 1,024 with and without YaRN, and asks for a value that text before
names. Prints a table, draws accuracy by depth and length, and returns 1 if a rule does not hold.
"""

import argparse
import json
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from tests.needle.experiment import Recipe, failures, lines, run_seed
from tests.needle.measure import LENGTHS


def main() -> int:
    """Runs all seeds, two at a time by default."""
    arguments = _arguments()
    recipe, began = Recipe(arguments.base_steps, arguments.long_steps), time.monotonic()
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    with ProcessPoolExecutor(arguments.jobs, mp_context=context) as pool:
        found = dict(zip(arguments.seeds, pool.map(partial(run_seed, recipe=recipe), arguments.seeds), strict=True))
    lengths = " | ".join(f"{length:,}" for length in LENGTHS)
    print(f"| seed | network | {lengths} | bits per byte at 0-128 / 512-1,024 |")
    print("|" + " --- |" * (3 + len(LENGTHS)))
    for seed, results in found.items():
        print("\n".join(lines(seed, recipe, results)))
    broken = [f"seed {seed}: not so: {rule}" for seed, results in found.items() for rule in failures(results)]
    print("\n".join(broken) if broken else f"all rules hold for {len(found)} seeds")
    print(f"{time.monotonic() - began:.0f} s")
    if arguments.results is not None:
        values = {seed: {name: each.as_json() for name, each in results.items()} for seed, results in found.items()}
        arguments.results.write_text(json.dumps(values), encoding="utf-8")
    if arguments.picture is not None:
        from tests.needle.picture import draw

        seed = arguments.seeds[0]
        title = f"Share of right answers, seed {seed}: base of 128 tokens, {recipe.base_steps:,} steps"
        draw(found[seed], recipe.long_steps, title, arguments.picture)
    return int(bool(broken))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.needle", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="seeds at a time, one core each")
    parser.add_argument("--base-steps", type=int, default=Recipe().base_steps)
    parser.add_argument("--long-steps", type=int, default=Recipe().long_steps)
    parser.add_argument("--results", type=Path, help="file for all numbers, as JSON")
    parser.add_argument("--picture", type=Path, help="file for the heat map of the first seed")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
