"""Steps of uneven stages with exchange and groups of three do not take less than the simulated time.

`make bench ARGS="--sections groups"` measures how much more they take on a machine that does nothing else.
"""

import pytest

from tests.bench.grouped_stages import CASES, MOST_OVER, grouped_text, measure_grouped
from tests.bench.handling import build_row


@pytest.mark.long
def test_step_of_grouped_sleeping_stages_is_not_faster_than_simulated() -> None:
    steps = measure_grouped(8, 16, 0.24, CASES[2:3], 1)
    assert all(step.triples for step in steps), grouped_text(steps)
    assert min(step.ratio for step in steps) >= 1 - MOST_OVER, grouped_text(steps)


def test_row_of_builds_has_equal_and_uneven_stages() -> None:
    row = build_row("dualpipe_interleaved", 2, (4, 12), 0.0)
    assert row.startswith("dualpipe_interleaved 2 (4, 12), x 0: equal stages ")
    assert row.count("overhead") == 2
