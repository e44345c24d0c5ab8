"""Chooses the parameters of a test that `make test` runs: each value, or each pair of values, at least once."""

import random
from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations
from typing import Any

import pytest


def covering(cases: Sequence[Mapping[str, Any]], strength: int = 2) -> set[int]:
    """Returns positions of few cases that hold every combination of `strength` parameters that any case holds.

    Greedy in a seeded order, so that two processes choose the same cases.
    """
    combinations_of = [_combinations(case, strength) for case in cases]
    missing = set().union(*combinations_of)
    order = random.Random(0).sample(range(len(cases)), len(cases))
    chosen: set[int] = set()
    while missing:
        best = max(order, key=lambda position: len(combinations_of[position] & missing))
        chosen.add(best)
        missing -= combinations_of[best]
    return chosen


def _combinations(case: Mapping[str, Any], strength: int) -> set[tuple[Hashable, ...]]:
    """Returns the combinations of names and values in a case; one with fewer parameters has a single combination."""
    values = [(name, _key(case[name])) for name in sorted(case)]
    return set(combinations(values, min(strength, len(values))))


def _key(value: Any) -> Hashable:
    try:
        hash(value)
    except TypeError:
        return repr(value)
    return type(value), value


def exhaustive(*values: Any) -> list[Any]:
    """Returns parameters that only `make test-exhaustive` runs."""
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.exhaustive)
        for value in values
    ]
