"""The board of schedules scores valid entries, refuses wrong ones with their rule, and its page is current."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench.board import ENTRIES, GRID, PAGE, main, row_of
from dualpipe.builder import build_schedule
from dualpipe.ir import to_json
from dualpipe.registry import SCHEDULES


def entry(ranks: int = 4, micro_batches: int = 8) -> dict[str, Any]:
    return json.loads(to_json(build_schedule("1f1b", ranks, micro_batches)))


def wrong_entries() -> dict[str, str]:
    """Returns entries with one fault each, by the rule that the message names."""
    faults = {
        "not JSON": "{",
        "the key": json.dumps(entry()).replace('"kind"', '"sort"'),
        "nearest valid: (4, 8)": json.dumps(entry(4, 6)),
    }
    missing, twice, swapped, moved, order = (entry() for _ in range(5))
    missing["ranks"][1].pop()
    twice["ranks"][1].append(twice["ranks"][1][-1])
    moved["ranks"][0].append(moved["ranks"][1].pop())
    first = next(i for i, group in enumerate(order["ranks"][3]) if group[0][0] == "B")
    order["ranks"][3].insert(0, order["ranks"][3].pop(first))
    forwards = [i for i, group in enumerate(swapped["ranks"][2]) if group[0][0] == "F"][:2]
    a, b = forwards
    swapped["ranks"][2][a], swapped["ranks"][2][b] = swapped["ranks"][2][b], swapped["ranks"][2][a]
    many = entry()
    for rank in many["ranks"]:
        rank.sort(key=lambda group: group[0][0] == "B")
    faults |= {
        "has F but no backward": json.dumps(missing),
        "appears twice": json.dumps(twice),
        "belongs to rank 1": json.dumps(moved),
        "which it needs": json.dumps(order),
        "rank 2": json.dumps(swapped),
        "the memory cap is 6": json.dumps(many),
    }
    stuck = entry()
    first = next(i for i, group in enumerate(stuck["ranks"][0]) if group[0][0] == "B")
    stuck["ranks"][0].insert(1, stuck["ranks"][0].pop(first))
    return faults | {"deadlock": json.dumps(stuck)}


def test_wrong_entries_are_refused_with_their_rule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rule, text in wrong_entries().items():
        path = tmp_path / "entry.json"
        path.write_text(text)
        assert main([str(path)]) == 2, rule
        error = capsys.readouterr().err
        assert rule in error, (rule, error)


def test_a_valid_entry_has_a_score_for_each_line_of_its_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "entry.json"
    path.write_text(json.dumps(entry()))
    assert main([str(path)]) == 0
    assert capsys.readouterr().out.splitlines()[1:4] == [
        "entry.json",
        "",
        "- 4, 8, 1 : 1 : 1, 0, 0, 6: 33",
    ]


def test_a_plugin_is_scored_in_all_cells_that_it_fits_and_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    try:
        assert main(["--html", str(page), str(ENTRIES / "eager_1f1b.py")]) == 0
    finally:
        SCHEDULES.remove(SCHEDULES.from_plugins())
    lines = capsys.readouterr().out.splitlines()
    # It keeps P + 2 activations: all limits but P / 2 + 1.
    assert len([line for line in lines if line.startswith("- ")]) == len([c for c in GRID if c.cap > c.ranks])
    assert page.read_text().count("<svg") > len(SCHEDULES.names())


def test_a_plugin_without_a_kind_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.py").write_text("x = 1\n")
    assert main([str(tmp_path / "other.py")]) == 2
    assert "registers nothing" in capsys.readouterr().err


def test_the_page_is_current() -> None:
    assert f"\n{row_of(GRID[0])}\n" in PAGE.read_text(), "python -m bench.board --write"
