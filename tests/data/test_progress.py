"""Tests of progress: quick work prints nothing, long work prints a count and the remaining time at a limited rate."""

import io
import itertools
import re

from data.progress import ProgressLines, progress_on, progress_text, seconds_text


def shown(num_items: int, seconds_each: float) -> list[str]:
    """Returns the progress lines of work on items of a megabyte."""
    now, lines = [0.0], []

    def work() -> object:
        for _ in range(num_items):
            now[0] += seconds_each
            yield 10**6

    progress = ProgressLines(lines.append, lambda: now[0])
    assert list(progress.over("reading", work(), num_items * 10**6, int)) == [10**6] * num_items
    return lines


def test_quick_work_is_not_mentioned() -> None:
    assert shown(100, 0.005) == []


def test_long_work_has_a_line_every_five_seconds_with_the_time_left() -> None:
    lines = shown(200, 0.1)
    assert re.fullmatch(r"reading: (9|10|11).0 MB of 200.0 MB, \d+ %, \d+ s left", lines[0])
    assert len(lines) == 5
    assert lines[-1] == "reading: done, 200.0 MB in 20 s"


def test_many_small_items_do_not_flood() -> None:
    assert len(shown(100_000, 0.0001)) <= 4


def test_lines_go_to_what_is_no_terminal() -> None:
    assert isinstance(progress_on(io.StringIO()), ProgressLines)


def test_texts_are_short() -> None:
    assert progress_text(0, 10**9, 1.0) == "0.0 MB of 1.0 GB, 0 %"
    assert progress_text(5 * 10**8, 10**9, 100.0) == "500.0 MB of 1.0 GB, 50 %, 1 min left"
    assert seconds_text(7260) == "2 h 1 min"


def test_progress_counts_phases() -> None:
    said: list[str] = []
    clock = itertools.count().__next__
    assert list(ProgressLines(said.append, clock).over("first step", range(4), 4, lambda _: 1, "phases")) == [
        0,
        1,
        2,
        3,
    ]
    assert said[0] == "first step: 1 of 4 phases, 25 %, 3 s left"
    assert said[-1] == "first step: done, 4 phases in 5 s"
