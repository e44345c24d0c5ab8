"""The text table over schedules: a line per kind, aligned, ASCII, with reasons for what is absent."""

import pytest

from dualpipe.draw.entry import Absent, entry
from dualpipe.draw.table import COLUMNS, table
from dualpipe.generate.dualpipe_v import dualpipe_v
from dualpipe.registry import build
from dualpipe.simulate.costs import Costs

UNIT = Costs(forward=1, backward_input=1, backward_weight=1, exchange=0, latency=0)
REASON = "needs an even number of micro-batches, half for each direction, has 13; nearest: 12 or 14"


def test_table_gives_the_numbers_of_each_schedule() -> None:
    lines = table([entry(build("dualpipe", 8, 20), UNIT), entry(build("1f1b", 8, 20), UNIT)]).splitlines()
    assert lines[0].split() == ["schedule", "overhead", "makespan", "bubble", "%", "exposed", "peak", "bound", "above"]
    assert lines[1].split() == ["dualpipe", "6", "66", "9.09", "0", "9", "63", "3"]
    assert lines[2].split() == ["1f1b", "21", "81", "25.93", "0", "8", "67", "14"]
    assert len({len(line) for line in lines[:3]}) == 1


def test_table_tells_idle_from_exposed_and_bounds_under_the_cap() -> None:
    costs = Costs(forward=1, backward_input=1, backward_weight=1, exchange=1, latency=0)
    shown = entry(build("dualpipe", 4, 8), costs, memory_cap=5)
    # Of an overhead of 13, each rank idles 3 and leaves 10 of exchange in the open.
    assert table([shown]).splitlines()[1].split() == ["dualpipe", "13", "37", "8.11", "10", "5", "29", "8"]


def test_table_counts_memory_in_shares_of_a_rank() -> None:
    shown = entry(dualpipe_v(4, 12), UNIT)
    assert table([shown]).splitlines()[1].split() == ["dualpipe_v", "3", "39", "7.69", "0", "4.5", "37.5", "1.5"]


@pytest.mark.parametrize("width", [80, 100, 160])
def test_table_tells_why_a_kind_is_absent_within_the_width(width: int) -> None:
    text = table([Absent(kind="dualpipe", reason=REASON), entry(build("1f1b", 5, 13), UNIT)], width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert lines[1].startswith("dualpipe  - needs an even")
    body = " ".join(
        line.strip() for line in lines[1 : next(i for i, line in enumerate(lines) if line.startswith("1f1b"))]
    )
    assert body == f"dualpipe  - {REASON}"


def test_table_of_nothing_is_its_head() -> None:
    assert table([]).splitlines()[0].split("  ")[0] == COLUMNS[0]


def test_table_is_ascii_whatever_the_reason() -> None:
    assert table([Absent(kind="é", reason="→ nowhere")]).isascii()
