"""Tests that calls in threads return in order, and that those which hang or fail do not stop the others."""

import threading
import time
from collections.abc import Iterator

import pytest

from infer.scoring.workers.threads import Abandoned, Raised, Returned, TooManyAbandonedError, run_in_threads


@pytest.fixture
def hang() -> Iterator[threading.Event]:
    """Yields an event that hanging calls wait for, so that their threads end after the test."""
    event = threading.Event()
    yield event
    event.set()


def test_threads_return_results_in_the_order_of_the_calls() -> None:
    calls = [lambda n=n: time.sleep(0.001 * (5 - n % 5)) or n for n in range(20)]
    assert run_in_threads(calls, 4, 10.0, KeyError) == [Returned(n) for n in range(20)]
    assert run_in_threads([], 4, None, KeyError) == []


def test_threads_abandon_calls_that_hang_and_keep_the_others(hang: threading.Event) -> None:
    def fail() -> int:
        raise ValueError("broken")

    calls = [hang.wait, lambda: 1, fail, hang.wait, lambda: 2]
    results = run_in_threads(calls, 2, 0.2, KeyError)
    first, one, broken, second, two = results
    assert (one, two) == (Returned(1), Returned(2))
    assert isinstance(broken, Raised)
    assert str(broken.error) == "broken"
    assert {type(first), type(second)} == {Abandoned}


def test_threads_give_up_if_only_abandoned_calls_follow_each_other(hang: threading.Event) -> None:
    began = time.monotonic()
    with pytest.raises(TooManyAbandonedError):
        run_in_threads([hang.wait] * 100, 2, 0.05, KeyError)
    assert time.monotonic() - began < 5


def test_threads_end_with_the_first_fatal_error() -> None:
    done: list[int] = []

    def fail() -> None:
        raise KeyError("fatal")

    with pytest.raises(KeyError, match="fatal"):
        run_in_threads([fail, *(lambda: time.sleep(0.01) or done.append(1) for _ in range(500))], 1, None, KeyError)
    assert len(done) < 500
