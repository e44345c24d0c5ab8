"""Orders of the list builder are valid, fit memory and have the returned makespan."""

from dataclasses import replace
from random import Random

import pytest

from dualpipe.generate.builder import Builder
from dualpipe.generate.dualpipe_split import empty
from dualpipe.generate.preferences import change, draw
from dualpipe.generate.zero_bubble import zb_v
from dualpipe.ir import Schedule
from dualpipe.simulate.costs import CostModel, Costs, StageCosts, uniform
from dualpipe.simulate.simulate import peak_memory, simulate
from dualpipe.validate import validate


def random_costs(num_stages: int, random: Random) -> CostModel:
    stages = tuple(
        StageCosts(
            forward=random.uniform(0.5, 2),
            backward_input=random.uniform(0.5, 2),
            backward_weight=random.uniform(0.2, 2),
            forward_exchange=random.choice([0.0, random.uniform(0, 2)]),
            backward_exchange=random.choice([0.0, random.uniform(0, 2)]),
            activation=random.uniform(0.5, 1.5),
        )
        for _ in range(num_stages)
    )
    return CostModel(stages=stages, latency=random.choice([0.0, 0.25]))


@pytest.mark.parametrize("num_ranks", range(1, 7))
def test_builder_builds_valid_orders_of_the_returned_makespan(num_ranks: int) -> None:
    random = Random(num_ranks)
    for shape in (*(empty(num_ranks, count) for count in (1, num_ranks, 2 * num_ranks + 1)), zb_v(num_ranks, 5)):
        for _ in range(6):
            costs = random_costs(shape.num_stages, random)
            cap = sum(stage.activation for stage in costs.stages) + 2 * max(s.activation for s in costs.stages)
            builder = Builder(shape, costs, cap)
            preferences = change(draw(random, len(builder.directions), 4, 3), random)
            attempt = builder.build(preferences, float("inf"))
            assert attempt.ranks is not None
            schedule = replace(shape, ranks=attempt.ranks)
            validate(schedule)
            assert max(peak_memory(schedule, costs)) <= cap + 1e-6
            # The builder may wait on purpose, which the order alone does not.
            assert simulate(schedule, costs).makespan <= attempt.time + 1e-6


def test_builder_stops_as_soon_as_a_makespan_is_out_of_reach() -> None:
    shape = empty(4, 9)
    builder = Builder(shape, uniform(unit(), 4, 4), 5.0)
    preferences = draw(Random(1), len(builder.directions), 4, 3)
    whole = builder.build(preferences, float("inf"))
    assert builder.build(preferences, whole.time).ranks == whole.ranks
    shorter = builder.build(preferences, whole.time - 1)
    assert shorter.ranks is None
    assert shorter.effort < whole.effort
    assert shorter.progress < whole.progress == 3 * 9
    assert builder.build(preferences, 3 * 9 - 1).effort == 0


@pytest.mark.parametrize("cap", [2, 3, 4])
def test_builder_keeps_any_cap_that_one_micro_batch_per_stage_fits(cap: int) -> None:
    random = Random(3)
    shape: Schedule = empty(4, 9)
    builder = Builder(shape, uniform(unit(), 4, 4), cap)
    for _ in range(20):
        attempt = builder.build(draw(random, len(builder.directions), 4, 3), float("inf"))
        assert attempt.ranks is not None
        validate(replace(shape, ranks=attempt.ranks), cap)


def unit() -> Costs:
    return Costs(forward=1, backward_input=1, backward_weight=1, exchange=0, latency=0)
