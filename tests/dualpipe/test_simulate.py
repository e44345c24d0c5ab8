"""Simulated times equal published formulas and the event clock, and the steady state is right."""

import random
from dataclasses import replace
from random import Random

import pytest

from dualpipe.builder import build_schedule
from dualpipe.costs import CostModel, Costs, StageCosts, resampled, uniform
from dualpipe.draw.entry import Pace, pace_of
from dualpipe.generate.dualpipe import dualpipe, dualpipe_v, published_idle
from dualpipe.generate.dualpipe_interleaved import empty
from dualpipe.generate.lockstep import lockstep
from dualpipe.generate.one_f_one_b import one_f_one_b
from dualpipe.generate.search import lengthen
from dualpipe.generate.zero_bubble import zb_v
from dualpipe.ir import Op, Operation, Schedule, ScheduleError
from dualpipe.passes import fuse
from dualpipe.registry import SCHEDULES
from dualpipe.simulation import Timing, peak_activations, simulate
from dualpipe.validate import validate
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

UNIT = Costs(forward=1, backward_input=1, backward_weight=1, exchange=0, latency=0)
EXCHANGING = Costs(forward=1, backward_input=1, backward_weight=1, exchange=1, latency=0)


def without_exchange(forward: float, backward_input: float, backward_weight: float) -> Costs:
    return Costs(forward=forward, backward_input=backward_input, backward_weight=backward_weight, exchange=0, latency=0)


@pytest.mark.parametrize(("num_ranks", "unit", "exchanging", "peak"), [(4, 2, 13, 5), (8, 6, 27, 9)])
def test_dualpipe_reaches_the_published_overhead_and_memory(
    num_ranks: int, unit: int, exchanging: int, peak: int
) -> None:
    for num_micro_batches in (2 * num_ranks, 3 * num_ranks):
        schedule = build_schedule("dualpipe", num_ranks, num_micro_batches)
        simulation = simulate(schedule, UNIT)
        assert simulation.makespan - 3 * num_micro_batches == unit == published_idle(num_ranks, UNIT)
        assert simulation.peaks == (peak,) * num_ranks
        assert simulate(schedule, EXCHANGING).makespan - 3 * num_micro_batches == exchanging
        assert max(simulate(schedule, EXCHANGING).idle) == published_idle(num_ranks, EXCHANGING)


def test_dualpipe_idles_by_the_published_formula_if_forward_and_backward_input_cost_the_same() -> None:
    # The law: with F = I >= W and no exchange, every rank idles exactly (P/2-1)(F&B+B-3W).
    generator = random.Random(1)
    for _ in range(40):
        num_ranks = generator.choice([2, 4, 6, 8, 10])
        forward = generator.uniform(1, 10)
        costs = without_exchange(forward, forward, generator.uniform(0, forward))
        schedule = build_schedule("dualpipe", num_ranks, 2 * num_ranks + 2 * generator.randrange(4))
        expected = published_idle(num_ranks, costs)
        assert simulate(schedule, costs).idle == pytest.approx((expected,) * num_ranks, abs=1e-9)


def test_groups_cost_the_longer_lane_or_their_longest_member() -> None:
    costs = uniform(Costs(forward=2, backward_input=3, backward_weight=1, exchange=5, latency=0), 1, 1)
    forward, backward = Operation(Op.FORWARD, 0, 0, 0), Operation(Op.BACKWARD, 1, 0, 0)
    weight = Operation(Op.BACKWARD_WEIGHT, 0, 0, 1)
    assert costs.duration_of((forward,)) == 2 + 5
    assert costs.duration_of((backward,)) == 3 + 1 + 5
    assert costs.duration_of((weight,)) == 1
    assert costs.duration_of((forward, backward)) == 5 + 5
    assert costs.duration_of((forward, weight)) == 2 + 5
    assert uniform(without_exchange(2, 3, 1), 1, 1).duration_of((forward, backward)) == 2 + 3 + 1


def test_simulation_starts_each_group_as_soon_as_it_can() -> None:
    costs = Costs(forward=1, backward_input=2, backward_weight=1, exchange=0, latency=0.5)
    simulation = simulate(build_schedule("1f1b", 2, 1), costs)
    assert simulation.starts == ((0, 6), (1.5, 2.5))
    assert simulation.ends == ((1, 9), (2.5, 5.5))
    assert simulation.makespan == 9
    assert simulation.idle == (5, 5)
    assert simulation.bubble_fraction == pytest.approx(10 / 18)


def test_simulation_rejects_a_deadlock() -> None:
    first, second = (Operation(Op.FORWARD, 0, stage, 0) for stage in (0, 1))
    schedule = Schedule(
        kind="any", num_ranks=1, num_micro_batches=1, placement=((0, 0),), ranks=(((second,), (first,)),)
    )
    with pytest.raises(ScheduleError, match=r"rank 0: F1\.0 never starts: deadlock"):
        simulate(schedule, UNIT)


@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_costs_reject_invalid_times(value: float) -> None:
    with pytest.raises(ScheduleError, match=r"costs\.latency: must be a finite number of at least 0"):
        Costs(forward=1, backward_input=1, backward_weight=1, exchange=0, latency=value)


@pytest.mark.parametrize("alone", [1.0, 0.8])
def test_exposed_exchange_is_that_of_lone_groups_also_if_they_compute_faster(alone: float) -> None:
    schedule = build_schedule("dualpipe", 4, 8)
    simulation = simulate(schedule, replace(uniform(EXCHANGING, 4, 4), alone=alone))
    # A pair computes for three units and exchanges for two, so only lone F and I (or B) expose their exchange.
    lone = [
        sum(len(group) == 1 and group[0].kind is not Op.BACKWARD_WEIGHT for group in rank) for rank in schedule.ranks
    ]
    assert simulation.exposed == pytest.approx(lone)


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
def test_event_clock_agrees_with_the_simulator_on_copies_to_host_memory(placement: tuple[tuple[int, ...], ...]) -> None:
    waits = 0
    for seed in range(6):
        schedule = offloaded(random_schedule(placement, 4, seed), seed)
        costs = random_costs(Random(seed), schedule.num_stages)
        check_agreement(schedule, costs)
        free = replace(costs, stages=tuple(replace(stage, offload=0.0) for stage in costs.stages))
        check_agreement(schedule, free)
        waits += simulate(schedule, costs).makespan > simulate(schedule, free).makespan
    assert waits >= 3


@pytest.mark.parametrize("kind", SCHEDULES.names())
def test_event_clock_agrees_with_the_simulator_on_generated_schedules(kind: str) -> None:
    schedule = build_schedule(kind, 4, 12)
    check_agreement(schedule, random_costs(Random(kind), schedule.num_stages))


TIMING_SCHEDULES = [dualpipe(4, 10), zb_v(3, 5), one_f_one_b(5, 7), lockstep(empty(5, 9), paired=True)]


@pytest.mark.parametrize("schedule", TIMING_SCHEDULES, ids=lambda schedule: schedule.kind)
def test_timing_in_parts_equals_timing_at_once(schedule: Schedule) -> None:
    timing = Timing(schedule, random_costs(Random(7), schedule.num_stages).without_offload())
    ranks = [timing.numbered(groups) for groups in schedule.ranks]
    progress = timing.begin(ranks)
    for until in (1, 2, 7, 8):
        before = progress.copy()
        assert timing.advance(ranks, progress, until=until)
        assert before.position != progress.position
        assert max(progress.position) <= until
    assert timing.advance(ranks, progress)
    assert progress.ends == timing.run(ranks)
    assert progress.left == pytest.approx([0.0] * len(ranks), abs=1e-9)
    assert progress.clock == [max(progress.ends[n] for group in groups for n in group) for groups in ranks]


def longer(schedule: Schedule, num_micro_batches: int) -> Schedule | None:
    costs = uniform(UNIT, schedule.num_ranks, schedule.num_stages)
    return lengthen(schedule, costs, num_micro_batches, (1, 2))


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_lengthened_order_is_the_generated_order(num_ranks: int) -> None:
    assert longer(dualpipe(num_ranks, 4 * num_ranks), 6 * num_ranks + 2) == dualpipe(num_ranks, 6 * num_ranks + 2)
    for count in (4 * num_ranks, 4 * num_ranks + 1):
        expected = lockstep(empty(num_ranks, count + 10), paired=True)
        assert longer(lockstep(empty(num_ranks, count), paired=True), count + 10) == expected
    assert longer(one_f_one_b(num_ranks, 3 * num_ranks), 40) == one_f_one_b(num_ranks, 40)
    assert longer(dualpipe_v(num_ranks, 4 * num_ranks), 40) == dualpipe_v(num_ranks, 40)


@pytest.mark.parametrize(("num_ranks", "count"), [(4, 16), (5, 20)])
def test_lengthening_adds_only_work_to_a_fused_order(num_ranks: int, count: int) -> None:
    costs = uniform(EXCHANGING, num_ranks, num_ranks)
    few = fuse(lockstep(empty(num_ranks, count), paired=True), costs)
    many = lengthen(few, costs, count + 60, (1, 2, 3))
    assert many is not None
    validate(many)
    assert simulate(many, costs).makespan - simulate(few, costs).makespan == 3 * 60
    assert peak_activations(many) == peak_activations(few)


def test_lengthening_is_impossible_without_a_steady_state() -> None:
    schedule = dualpipe(4, 12)
    assert longer(schedule, 12) == schedule
    assert longer(schedule, 15) is None, "an odd number cannot be shared by two directions"
    assert longer(one_f_one_b(4, 1), 40) is None


def costs_of(num_stages: int, exchange: float = 0.0, latency: float = 0.0) -> CostModel:
    times = Costs(forward=1, backward_input=1, backward_weight=1, exchange=exchange, latency=latency)
    return uniform(times, 4, num_stages)


def state_of(kind: str, exchange: float = 0.0, latency: float = 0.0, cap: float | None = None) -> Pace:
    costs = costs_of(SCHEDULES.get(kind).num_stages(4), exchange, latency)
    schedule = build_schedule(kind, 4, 32, costs)
    state = pace_of(schedule, costs, simulate(schedule, costs), cap)
    assert state is not None
    return state


@pytest.mark.covering(1)
@pytest.mark.parametrize("exchange", [0.0, 1.0])
@pytest.mark.parametrize("kind", SCHEDULES.names())
def test_losses_of_a_rank_are_its_time_without_computation(kind: str, exchange: float) -> None:
    costs = costs_of(SCHEDULES.get(kind).num_stages(4), exchange)
    schedule = build_schedule(kind, 4, 32, costs)
    simulation = simulate(schedule, costs)
    state = pace_of(schedule, costs, simulation)
    assert state is not None
    for rank in state.ranks:
        assert sum(rank.losses) == pytest.approx(simulation.makespan - 32 * rank.work)
        assert rank.length >= rank.work - 1e-9


def test_limit_is_the_lane_that_is_full() -> None:
    assert state_of("zb_v").limit.startswith("computation")
    assert state_of("dualpipe", exchange=6.0).limit.startswith("exchange: rank ")


def test_limit_is_the_cost_without_which_the_order_is_shorter() -> None:
    assert state_of("dualpipe", exchange=1.0, latency=0.5).limit.startswith("latency: without it, this order would")
    assert state_of("1f1b", exchange=1.0).limit.startswith("exchange that groups do not hide")


def test_schedule_with_few_micro_batches_has_no_steady_state() -> None:
    costs = costs_of(4)
    schedule = build_schedule("1f1b", 4, 1)
    assert pace_of(schedule, costs, simulate(schedule, costs)) is None


NAMES = ("forward", "backward_input", "backward_weight", "forward_exchange", "backward_exchange", "activation")


def model_of(num_stages: int) -> CostModel:
    """Returns stages of which each costs more than the one before."""
    stages = (StageCosts(**dict.fromkeys(NAMES, 1.0 + stage)) for stage in range(num_stages))
    return CostModel(stages=tuple(stages), latency=0.5)


@pytest.mark.parametrize(("old", "new"), [(4, 8), (4, 4), (6, 4)])
def test_resampled_costs_are_those_of_the_same_model(old: int, new: int) -> None:
    before, after = model_of(old), resampled(model_of(old), new)
    assert len(after.stages) == new
    assert after.latency == before.latency
    for name in NAMES:
        total = sum(getattr(stage, name) for stage in before.stages)
        assert sum(getattr(stage, name) for stage in after.stages) == pytest.approx(total)
    assert [stage.forward for stage in after.stages] == sorted(stage.forward for stage in after.stages)


def test_resampled_costs_halve_and_add_whole_stages() -> None:
    assert [stage.forward for stage in resampled(model_of(2), 4).stages] == [0.5, 0.5, 1.0, 1.0]
    assert [stage.forward for stage in resampled(model_of(4), 2).stages] == [3.0, 7.0]
