"""The simulator and the event clock agree: any placement, any groups, costs of every stage."""

from dataclasses import replace
from random import Random

import pytest

from dualpipe.build import build
from dualpipe.ir import Schedule
from dualpipe.registry import SCHEDULES
from dualpipe.simulate.costs import CostModel
from dualpipe.simulate.simulate import simulate
from tests.dualpipe.event_clock import EventClock
from tests.dualpipe.random_schedules import (
    bidirectional,
    looped,
    offloaded,
    random_costs,
    random_schedule,
    straight,
    v_shaped,
)

PLACEMENTS = [
    straight(3),
    v_shaped(3),
    bidirectional(4),
    looped(3, 2),
    tuple(row * 2 for row in bidirectional(2)),
    tuple(row * 3 for row in bidirectional(3)),
]


def check_agreement(schedule: Schedule, costs: CostModel) -> None:
    simulation, clock = simulate(schedule, costs), EventClock(schedule, costs)
    for rank in range(schedule.num_ranks):
        assert simulation.ends[rank] == pytest.approx(clock.ends[rank], abs=1e-9), f"rank {rank}"
        assert simulation.peaks[rank] == pytest.approx(clock.peaks[rank]), f"rank {rank}"
    assert simulation.makespan == pytest.approx(clock.makespan)


@pytest.mark.parametrize("placement", PLACEMENTS, ids=str)
def test_event_clock_agrees_with_the_simulator_on_random_schedules(placement: tuple[tuple[int, ...], ...]) -> None:
    sizes = set()
    for seed in range(12):
        schedule = random_schedule(placement, 4, seed)
        sizes |= {len(group) for groups in schedule.ranks for group in groups}
        check_agreement(schedule, random_costs(Random(seed), schedule.num_stages))
    assert sizes >= {1, 2, 3}


@pytest.mark.parametrize("placement", PLACEMENTS, ids=str)
def test_event_clock_agrees_with_the_simulator_on_copies_to_host_memory(
    placement: tuple[tuple[int, ...], ...],
) -> None:
    waits = 0
    for seed in range(12):
        schedule = offloaded(random_schedule(placement, 4, seed), seed)
        costs = random_costs(Random(seed), schedule.num_stages)
        check_agreement(schedule, costs)
        free = replace(costs, stages=tuple(replace(stage, offload=0.0) for stage in costs.stages))
        check_agreement(schedule, free)
        waits += simulate(schedule, costs).makespan > simulate(schedule, free).makespan
    assert waits >= 6


@pytest.mark.parametrize("kind", SCHEDULES.names())
def test_event_clock_agrees_with_the_simulator_on_generated_schedules(kind: str) -> None:
    schedule = build(kind, 4, 12)
    check_agreement(schedule, random_costs(Random(kind), schedule.num_stages))
