"""A searched schedule is made once for its inputs and program, and never read from an invalid file."""

from pathlib import Path

import pytest

from dualpipe.generate import cache
from dualpipe.generate.cache import load_or_make
from dualpipe.generate.dualpipe_interleaved import dualpipe_split
from dualpipe.ir import Schedule
from dualpipe.registry import SCHEDULES
from dualpipe.simulate.costs import CostModel, Costs, uniform
from kernels.registry import load_plugins

COSTS = uniform(Costs(forward=1, backward_input=1, backward_weight=1, exchange=0, latency=0), 2, 2)
OTHER = uniform(Costs(forward=1, backward_input=2, backward_weight=1, exchange=0, latency=0), 2, 2)


class Counting:
    """Generator that records its calls."""

    __name__ = "counting"

    def __init__(self) -> None:
        self.calls: list[tuple[int, int, CostModel, float | None]] = []

    def __call__(self, num_ranks: int, num_micro_batches: int, costs: CostModel, cap: float | None) -> Schedule:
        self.calls.append((num_ranks, num_micro_batches, costs, cap))
        return dualpipe_split(num_ranks, num_micro_batches, costs, cap)


def test_cache_makes_once_for_the_same_inputs_and_again_for_others(tmp_path: Path) -> None:
    make = Counting()
    expected = [(2, 4, COSTS, None), (2, 5, COSTS, None), (2, 4, OTHER, None), (2, 4, COSTS, 2.0)]
    first = [load_or_make(make, *inputs, tmp_path / "new") for inputs in expected]
    again = [load_or_make(make, *inputs, tmp_path / "new") for inputs in expected]
    assert make.calls == expected
    assert first == again
    assert len(list((tmp_path / "new").iterdir())) == len(expected)


def test_cache_of_another_program_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = Counting()
    load_or_make(make, 2, 4, COSTS, None, tmp_path)
    monkeypatch.setattr(cache, "_program_digest", lambda make: "another")
    load_or_make(make, 2, 4, COSTS, None, tmp_path)
    assert len(make.calls) == 2


def test_cache_of_a_plugin_that_was_edited_is_not_used(tmp_path: Path) -> None:
    text = """
from dualpipe.generate.dualpipe_interleaved import dualpipe_split
from dualpipe.registry import SCHEDULES, ScheduleSpec

calls = []

def mine(*inputs):
    calls.append(inputs)
    return dualpipe_split(*inputs)

SCHEDULES.register("mine", ScheduleSpec(name="mine", summary="a copy", generate=mine, takes_costs=True))
"""
    path = tmp_path / "mine.py"
    try:
        for edit in ("", "# edited\n"):
            path.write_text(text + edit)
            for _ in range(2):
                (plugin,) = load_plugins([path])
                load_or_make(SCHEDULES.get("mine").generate, 2, 4, COSTS, None, tmp_path / "kept")
            assert len(plugin.calls) == 1
    finally:
        SCHEDULES.remove(["mine"])
    assert len(list((tmp_path / "kept").iterdir())) == 2


@pytest.mark.parametrize("damage", ["cut", "swapped", "empty"])
def test_cache_replaces_an_invalid_file(damage: str, tmp_path: Path) -> None:
    make = Counting()
    kept = load_or_make(make, 2, 4, COSTS, None, tmp_path)
    (path,) = tmp_path.iterdir()
    text = path.read_text()
    path.write_text({"cut": text[:-40], "swapped": text.replace('"I"', '"W"', 1), "empty": ""}[damage])
    assert load_or_make(make, 2, 4, COSTS, None, tmp_path) == kept
    assert len(make.calls) == 2
    assert path.read_text() == text


def test_cache_folder_that_cannot_be_written_only_costs_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    make = Counting()
    for _ in range(2):
        load_or_make(make, 2, 4, COSTS, None, tmp_path / "file" / "below")
    assert len(make.calls) == 2
