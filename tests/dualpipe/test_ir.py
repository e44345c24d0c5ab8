"""Schedules are converted to their public JSON form and back, and malformed JSON is rejected."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from dualpipe.build import build
from dualpipe.ir import Op, Operation, Schedule, ScheduleError, from_json, to_json

ROOT = Path(__file__).resolve().parents[2]


def test_json_round_trip_gives_the_same_schedule() -> None:
    for schedule in (build("dualpipe", 4, 10), build("1f1b", 3, 5), build("1f1b", 1, 1)):
        assert from_json(to_json(schedule)) == schedule


def test_operations_are_values_that_sort_by_kind_and_numbers() -> None:
    first, second = Operation(Op.FORWARD, 0, 1, 3), Operation(Op.FORWARD, 1, 0, 2)
    assert first == Operation(kind=Op.FORWARD, direction=0, stage=1, micro_batch=3)
    assert first.with_kind(Op.BACKWARD_WEIGHT) == Operation(Op.BACKWARD_WEIGHT, 0, 1, 3)
    assert sorted([first.with_kind(Op.BACKWARD_WEIGHT), second, first]) == [
        first,
        second,
        first.with_kind(Op.BACKWARD_WEIGHT),
    ]
    assert [str(op) for op in (first, second)] == ["F1.3", "F0.2'"]
    with pytest.raises(AttributeError):
        first.stage = 2  # type: ignore[misc]


def test_json_has_the_documented_keys_and_group_form() -> None:
    record = json.loads(to_json(build("dualpipe", 4, 8)))
    assert list(record) == ["kind", "num_ranks", "num_micro_batches", "num_stages", "placement", "ranks"]
    assert record["placement"] == [[0, 1, 2, 3], [3, 2, 1, 0]]
    assert record["ranks"][0][:2] == [[["F", 0, 0, 0]], [["F", 0, 0, 1]]]
    assert record["num_stages"] == 4


def good() -> dict[str, Any]:
    record: dict[str, Any] = json.loads(to_json(build("1f1b", 2, 2)))
    return record


def changed(**changes: Any) -> str:
    return json.dumps(good() | changes)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("{", "schedule: not JSON"),
        ("[]", "schedule: must be an object"),
        (json.dumps({key: value for key, value in good().items() if key != "ranks"}), "key 'ranks' is missing"),
        (changed(extra=1), "key 'extra' is unknown"),
        (changed(kind=3), "kind: must be a string"),
        (changed(num_ranks=True), "num_ranks: must be an integer"),
        (changed(num_ranks=3), "ranks: must have num_ranks = 3 entries, has 2"),
        (changed(num_micro_batches=-1), "num_micro_batches: must be an integer of at least 0, is -1"),
        (changed(num_stages=3), r"placement\[0\]: must have num_stages = 3 entries, has 2"),
        (changed(placement=[]), "placement: must have a row for each direction"),
        (changed(placement=[[0, "1"]]), r"placement\[0\]\[1\]: must be an integer"),
        (changed(ranks=[[], 7]), r"ranks\[1\]: must be a list, is 7"),
        (changed(ranks=[[], [{}]]), r"ranks\[1\]\[0\]: must be a list"),
        (changed(ranks=[[], [[["F", 0, 0]]]]), r"ranks\[1\]\[0\]\[0\]: must be \[kind, direction, stage"),
        (
            changed(ranks=[[[["X", 0, 0, 0]]], []]),
            r"ranks\[0\]\[0\]\[0\]: the kind must be one of F B I W O R, is \"X\"",
        ),
        (changed(ranks=[[[[["F"], 0, 0, 0]]], []]), "the kind must be one of F B I W O R"),
        (changed(ranks=[[[["F", 0, 0, 0.5]]], []]), r"ranks\[0\]\[0\]\[0\]: must be an integer of at least 0, is 0.5"),
    ],
)
def test_malformed_json_is_rejected_with_its_place(text: str, place: str) -> None:
    with pytest.raises(ScheduleError, match=place):
        from_json(text)


def test_operations_print_short_and_sort() -> None:
    assert str(Operation(Op.FORWARD, 0, 0, 3)) == "F0.3"
    assert str(Operation(Op.BACKWARD_INPUT, 1, 5, 12)) == "I5.12'"
    later, earlier = Operation(Op.FORWARD, 0, 1, 0), Operation(Op.FORWARD, 0, 0, 9)
    assert sorted([later, earlier]) == [earlier, later]
    assert len({later, Operation(Op.FORWARD, 0, 1, 0)}) == 1


def test_schedule_places_stages_and_splits_micro_batches() -> None:
    schedule = Schedule(
        kind="any", num_ranks=2, num_micro_batches=5, placement=((0, 1, 1, 0), (1, 0, 0, 1)), ranks=((), ())
    )
    assert schedule.num_stages == 4
    assert schedule.rank_of(1, 2) == 0
    assert schedule.stages_of(0) == ((0, 0), (0, 3), (1, 1), (1, 2))
    assert [list(schedule.micro_batches_of(direction)) for direction in (0, 1)] == [[0, 1, 2], [0, 1]]


def test_schedule_draws_itself_in_a_notebook() -> None:
    """Runs the lines of docs/python.md like a notebook, which shows the picture of the last line."""
    formatters = pytest.importorskip("IPython.core.formatters")
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "python.md").read_text("utf-8"), re.M | re.S)
    (block,) = (block for block in blocks if "dualpipe.registry" in block)
    names: dict[str, Any] = {}
    exec(block, names)
    assert block.rstrip().endswith("\nschedule")
    data, _ = formatters.DisplayFormatter().format(names["schedule"])
    assert ElementTree.fromstring(data["text/html"]).find("{http://www.w3.org/2000/svg}svg") is not None
    assert "dualpipe: 4 ranks, 10 micro-batches" in data["text/html"]


def test_schedule_that_cannot_run_has_no_picture() -> None:
    schedule = build("1f1b", 1, 1)
    assert replace(schedule, ranks=(schedule.ranks[0][::-1],))._repr_html_() is None
