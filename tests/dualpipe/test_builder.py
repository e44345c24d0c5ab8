"""Orders of the list builder are valid, fit memory and have the returned makespan."""

from dataclasses import replace
from random import Random

import pytest

from dualpipe.generate.dualpipe_interleaved import empty
from dualpipe.generate.list_builder.builder import build_order
from dualpipe.generate.list_builder.pipeline import Pipeline
from dualpipe.generate.list_builder.preferences import PRESETS, read_presets
from dualpipe.ir import Schedule, straight_placement
from dualpipe.simulate.costs import CostModel, Costs, uniform
from dualpipe.simulate.simulate import peak_memory, simulate
from dualpipe.validate import validate
from tests.bench import presets
from tests.dualpipe.random_schedules import random_costs

UNIT = Costs(forward=1, backward_input=1, backward_weight=1, exchange=0.8, latency=0)


@pytest.mark.parametrize("num_ranks", range(1, 6))
def test_builder_builds_valid_orders_of_the_returned_makespan(num_ranks: int) -> None:
    """Covers both directions and one, several chunks, and uneven stages; an attempt may also be given up."""
    random, complete = Random(num_ranks), 0
    for chunks in (1, 2, 3):
        for count in (1, num_ranks, 2 * num_ranks + 1):
            two = empty(num_ranks, count, chunks)
            for shape in (two, replace(two, placement=straight_placement(num_ranks, chunks))):
                complete += built(shape, random_costs(random, shape.num_stages).without_offload(), random)
    assert complete > 30


def built(shape: Schedule, costs: CostModel, random: Random) -> int:
    """Checks the orders of some presets, and returns how many were complete."""
    cap = sum(stage.activation for stage in costs.stages) + 2 * max(stage.activation for stage in costs.stages)
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


def test_presets_are_read_as_the_script_that_selects_them_writes_them() -> None:
    assert read_presets(presets.as_json(PRESETS)) == PRESETS
    assert presets.select([[1.0, 3.0], [2.0, 1.0], [1.5, 1.5]], 3) == [1, 0]


@pytest.mark.parametrize("cap", [2, 3, 4])
def test_builder_keeps_the_cap(cap: int) -> None:
    shape = empty(4, 9)
    pipeline = Pipeline(shape, uniform(UNIT, 4, 4), cap)
    attempts = [build_order(pipeline, preset, float("inf")) for preset in PRESETS]
    orders = [replace(shape, ranks=attempt.ranks) for attempt in attempts if attempt.ranks is not None]
    assert orders
    for order in orders:
        validate(order, cap)
