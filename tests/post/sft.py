"""Trains the recipe arithmetic_sft and checks what it learns: `python -m tests.post.sft`."""

import sys
from pathlib import Path

from tests.post.pass_rates import RecipeRates, measure_pass_rates
from tests.post.recipes import check_seeds, train_start

LEAST_PASS, MOST_PASS = 0.55, 0.65
"""Bounds of pass@1. A model that slips with probability 1/16 at each of 8 digits has 0.597."""
LEAST_GREEDY = 0.90


def problems_of_sft(rates: RecipeRates) -> list[str]:
    """Returns what the rates lack of law C1."""
    found = []
    if not LEAST_PASS <= rates.pass_at_1 <= MOST_PASS:
        found.append(f"pass@1 must be from {LEAST_PASS} to {MOST_PASS}, is {rates.pass_at_1:.3f}")
    if rates.greedy < LEAST_GREEDY:
        found.append(f"greedy must be at least {LEAST_GREEDY}, is {rates.greedy:.2f}")
    return found


def check(folder: Path, seed: int) -> list[str]:
    """Trains once, prints the rates, and returns what law C1 lacks."""
    rates = measure_pass_rates(train_start(folder, seed))
    print(f"seed {seed}: {rates}", flush=True)
    return problems_of_sft(rates)


if __name__ == "__main__":
    sys.exit(check_seeds("tests.post.sft", __doc__, check))
