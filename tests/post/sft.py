"""Trains the recipe arithmetic_sft and checks what it learns: `python -m tests.post.sft`."""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.post.pass_rates import RecipeRates, measure_pass_rates

LEAST_PASS, MOST_PASS = 0.55, 0.65
"""Bounds of pass@1. A model that slips with probability 1/16 at each of 8 digits has 0.597."""
LEAST_GREEDY = 0.90


def train_recipe(name: str, folder: Path, *overrides: str, run_name: str | None = None) -> Path:
    """Runs a recipe in a process, and returns the folder of the run, which is `run_name` or that of the recipe.

    Raises:
        RuntimeError: the run failed; the message has the end of its output.
    """
    out_dir = folder / (run_name or name)
    command = [sys.executable, "-m", "launch.train", f"experiment={name}", f"out_dir={out_dir}", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
    return out_dir


def problems_of_sft(rates: RecipeRates) -> list[str]:
    """Returns what the rates lack of law C1."""
    found = []
    if not LEAST_PASS <= rates.pass_at_1 <= MOST_PASS:
        found.append(f"pass@1 must be from {LEAST_PASS} to {MOST_PASS}, is {rates.pass_at_1:.3f}")
    if rates.greedy < LEAST_GREEDY:
        found.append(f"greedy must be at least {LEAST_GREEDY}, is {rates.greedy:.2f}")
    return found


def main(seeds: Sequence[int]) -> int:
    """Trains once for each seed, prints the rates, and returns 1 if one of them breaks a bound."""
    failures = 0
    for seed in seeds:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            run = train_recipe("arithmetic_sft", Path(folder), f"seed={seed}", f"data.generator_seed={seed}")
            rates = measure_pass_rates(run)
        found = problems_of_sft(rates)
        failures += bool(found)
        print(f"seed {seed}: {rates}  {time.perf_counter() - began:.0f} s  {'; '.join(found)}", flush=True)
    return int(failures > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.post.sft", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    sys.exit(main(parser.parse_args().seeds))
