"""The list builder, the search and its cache: valid orders within memory caps, made once for their inputs."""

from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from base.registry import load_plugins
from dualpipe import builder
from dualpipe.builder import load_or_make
from dualpipe.costs import CostModel, Costs, uniform
from dualpipe.generate.dualpipe_interleaved import dualpipe_interleaved, empty
from dualpipe.generate.list_builder import build_order
from dualpipe.generate.list_pipeline import PRESETS, Pipeline
from dualpipe.generate.search import in_sequence
from dualpipe.ir import MemoryCapError, Schedule, straight_placement
from dualpipe.registry import SCHEDULES
from dualpipe.simulation import peak_memory, simulate
from dualpipe.validate import validate
from tests.dualpipe.random_schedules import random_costs

UNIT = Costs(forward=1, backward_input=1, backward_weight=1, exchange=0.8, latency=0)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_builder_builds_valid_orders_of_the_returned_makespan(num_ranks: int) -> None:
    """Covers both directions and one, several chunks, and uneven stages; an attempt may also be given up."""
    random, complete = Random(num_ranks), 0
    for chunks in (1, 2, 3):
        for count in (1, num_ranks, 2 * num_ranks + 1):
            slices = random.choice((1, 2, 3, 5))
            two = empty(num_ranks, count * slices, chunks, slices)
            for shape in (two, replace(two, placement=straight_placement(num_ranks, chunks))):
                complete += built(shape, random_costs(random, shape.num_stages).without_offload(), random)
    assert complete > 20


def built(shape: Schedule, costs: CostModel, random: Random) -> int:
    """Checks the orders of some presets, and returns how many were complete."""
    cap = shape.slices * sum(stage.activation for stage in costs.stages)
    cap += 2 * shape.slices * max(stage.activation for stage in costs.stages)
    pipeline, complete = Pipeline(shape, costs, cap), 0
    for preset in random.sample(PRESETS, 4):
        attempt = build_order(pipeline, preset, float("inf"))
        if attempt.ranks is None:
            continue
        complete += 1
        schedule = replace(shape, ranks=attempt.ranks)
        validate(schedule)
        assert max(peak_memory(schedule, costs)) <= cap + 1e-6
        # The builder may wait on purpose, which the order alone does not.
        assert simulate(schedule, costs).makespan <= attempt.time + 1e-6
    return complete


def test_builder_stops_as_soon_as_a_makespan_is_out_of_reach() -> None:
    pipeline = Pipeline(empty(4, 9), uniform(UNIT, 4, 4), 5.0)
    whole = build_order(pipeline, PRESETS[0], float("inf"))
    assert build_order(pipeline, PRESETS[0], whole.time).ranks == whole.ranks
    shorter = build_order(pipeline, PRESETS[0], whole.time - 3)
    assert shorter.ranks is None
    assert shorter.effort < whole.effort
    assert build_order(pipeline, PRESETS[0], 3 * 9 - 1).effort == 0


COSTS = uniform(Costs(forward=1, backward_input=1, backward_weight=1, exchange=0, latency=0), 2, 2)
OTHER = uniform(Costs(forward=1, backward_input=2, backward_weight=1, exchange=0, latency=0), 2, 2)


class Counting:
    """Generator that records its calls."""

    __name__ = "counting"

    def __init__(self) -> None:
        self.calls: list[tuple[int, int, CostModel, float | None]] = []

    def __call__(self, num_ranks: int, num_micro_batches: int, costs: CostModel, cap: float | None) -> Schedule:
        self.calls.append((num_ranks, num_micro_batches, costs, cap))
        return dualpipe_interleaved(num_ranks, num_micro_batches, costs, cap)


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
    monkeypatch.setattr(builder, "_program_digest", lambda make: "another")
    load_or_make(make, 2, 4, COSTS, None, tmp_path)
    assert len(make.calls) == 2


def test_cache_of_a_plugin_that_was_edited_is_not_used(tmp_path: Path) -> None:
    text = """
from dualpipe.generate.dualpipe_interleaved import dualpipe_interleaved
from dualpipe.registry import SCHEDULES, ScheduleSpec

calls = []

def mine(*inputs):
    calls.append(inputs)
    return dualpipe_interleaved(*inputs)

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


@pytest.mark.parametrize("damage", ["swapped", "empty"])
def test_cache_replaces_an_invalid_file(damage: str, tmp_path: Path) -> None:
    make = Counting()
    kept = load_or_make(make, 2, 4, COSTS, None, tmp_path)
    (path,) = tmp_path.iterdir()
    text = path.read_text()
    path.write_text({"swapped": text.replace('"I"', '"W"', 1), "empty": ""}[damage])
    assert load_or_make(make, 2, 4, COSTS, None, tmp_path) == kept
    assert len(make.calls) == 2
    assert path.read_text() == text


def test_cache_folder_that_cannot_be_written_only_costs_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    make = Counting()
    for _ in range(2):
        load_or_make(make, 2, 4, COSTS, None, tmp_path / "file" / "below")
    assert len(make.calls) == 2


SEARCH_COSTS = Costs(forward=1, backward_input=1.3, backward_weight=0.7, exchange=0.9, latency=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("chunks", [1, 2])
def test_search_with_a_larger_cap_is_never_longer(chunks: int) -> None:
    costs = uniform(SEARCH_COSTS, 3, 3 * chunks)
    before = float("inf")
    for cap in (1, 1.5, 2, 2.7, 3, 4.5, 9):
        schedule = dualpipe_interleaved(3, 8, costs, cap)
        validate(schedule, cap)
        makespan = simulate(schedule, costs).makespan
        assert makespan <= before + 1e-9, f"a cap of {cap} gives {makespan}, a smaller one {before}"
        before = makespan


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.parametrize(("num_ranks", "num_micro_batches", "chunks"), [(3, 10, 2), (4, 12, 1), (4, 12, 2)])
def test_deeper_links_are_never_longer(num_ranks: int, num_micro_batches: int, chunks: int) -> None:
    """Alone, the searches for 2 or 3 messages find longer orders than those for one message less."""
    equal = Costs(forward=1, backward_input=1.3, backward_weight=0.7, exchange=0.5, latency=0.3)
    costs = replace(uniform(equal, num_ranks, chunks * num_ranks), slices=2)
    alone, best = [], []
    for depth in (1, 2, 3):
        deep = replace(costs, link_depth=depth)
        searched = dualpipe_interleaved(num_ranks, num_micro_batches, deep)
        built = builder.build_schedule("dualpipe_interleaved", num_ranks, num_micro_batches, deep)
        validate(built)
        assert built.link_depth == depth
        alone.append(simulate(searched, deep).makespan)
        best.append(simulate(built, deep).makespan)
    assert alone != sorted(alone, reverse=True), "no depth is longer than a smaller one, so the test has no effect"
    assert best == [min(alone[: depth + 1]) for depth in range(3)]


def test_search_extends_a_steady_state_to_many_micro_batches() -> None:
    costs = uniform(SEARCH_COSTS, 4, 8)
    many = dualpipe_interleaved(4, 200, costs)
    validate(many, 6)
    few = simulate(dualpipe_interleaved(4, 32, costs), costs).makespan - 3 * 32
    assert simulate(many, costs).makespan - 3 * 200 <= 2 * few


@pytest.mark.parametrize(("num_ranks", "chunks"), [(1, 2), (3, 1)])
def test_least_memory_is_one_activation(num_ranks: int, chunks: int) -> None:
    """When the last stage runs F, all stages hold the micro-batch, so no schedule keeps less than one."""
    costs = uniform(SEARCH_COSTS, num_ranks, num_ranks * chunks)
    schedule = dualpipe_interleaved(num_ranks, 5, costs, 1)
    validate(schedule, 1)
    with pytest.raises(MemoryCapError) as refused:
        dualpipe_interleaved(num_ranks, 5, costs, 0.99)
    assert refused.value.least == 1


def test_in_sequence_sends_gradients_before_weight_gradients() -> None:
    """A step of 4 ranks is a third shorter than if each micro-batch waited for every W of the one before it."""
    costs = uniform(Costs(forward=1, backward_input=1, backward_weight=1, exchange=0, latency=0), 4, 4)
    assert simulate(in_sequence(empty(4, 8, 1)), costs).makespan == 51
