"""Tests that a program of an answer gains nothing by sleeping."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from score import programs
from tests.score.hostile_programs import SLEEPERS, TESTS
from tests.score.test_code import UID, build, outside, run, scorer

__all__ = ["outside", "scorer"]
pytestmark = pytest.mark.slow


@pytest.mark.usefixtures("scorer", "outside")
def test_code_sleeping_programs_earn_nothing() -> None:
    """A program that sleeps is at fault, also on a busy machine: it does not wait for a processor."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "_unused_uid", lambda: UID)
        impatient = build(wall_seconds=2.0, num_sandboxes=len(SLEEPERS))
    begin = time.monotonic()
    with ThreadPoolExecutor(len(SLEEPERS)) as threads:
        scores = list(threads.map(lambda program: run(impatient, program, TESTS), SLEEPERS.values()))
    assert [score.outcome for score in scores] == ["timeout"] * len(SLEEPERS), scores
    assert time.monotonic() - begin < 2.0 + 1
