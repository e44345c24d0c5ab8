"""Steps of uneven stages with exchange and groups of three take the simulated time."""

import pytest

from tests.bench.grouped_stages import CASES, MOST_OVER, grouped_text, measure_grouped
from tests.bench.handling import build_row


@pytest.mark.long
def test_step_of_grouped_sleeping_stages_takes_the_simulated_time() -> None:
    # The fourth case has groups of two F whose phases cannot overlap perfectly: 1.02 of the simulated time even without
    # any delay (docs/benchmarks.md).
    steps = measure_grouped(8, 16, 0.24, CASES[:3], 3)
    assert all(step.triples for step in steps), grouped_text(steps)
    assert max(step.ratio for step in steps) <= 1 + MOST_OVER, grouped_text(steps)


def test_row_of_builds_has_equal_and_uneven_stages() -> None:
    row = build_row("dualpipe_interleaved", 2, (4, 12), 0.0)
    assert row.startswith("dualpipe_interleaved 2 (4, 12), x 0: equal stages ")
    assert row.count("overhead") == 2
