"""Simulated times equal published formulas, and groups have the right costs."""

import random
from dataclasses import replace

import pytest

from dualpipe.build import build
from dualpipe.generate.dualpipe import published_idle
from dualpipe.ir import Op, Operation, Schedule, ScheduleError
from dualpipe.passes import forward_only
from dualpipe.simulate.costs import Costs, uniform
from dualpipe.simulate.simulate import simulate

UNIT = Costs(forward=1, backward_input=1, backward_weight=1, exchange=0, latency=0)
EXCHANGING = Costs(forward=1, backward_input=1, backward_weight=1, exchange=1, latency=0)


def without_exchange(forward: float, backward_input: float, backward_weight: float) -> Costs:
    return Costs(forward=forward, backward_input=backward_input, backward_weight=backward_weight, exchange=0, latency=0)


@pytest.mark.parametrize(("num_ranks", "unit", "exchanging", "peak"), [(4, 2, 13, 5), (8, 6, 27, 9), (16, 14, 55, 17)])
def test_dualpipe_reaches_the_published_overhead_and_memory(
    num_ranks: int, unit: int, exchanging: int, peak: int
) -> None:
    for num_micro_batches in (2 * num_ranks, 3 * num_ranks):
        schedule = build("dualpipe", num_ranks, num_micro_batches)
        simulation = simulate(schedule, UNIT)
        assert simulation.makespan - 3 * num_micro_batches == unit == published_idle(num_ranks, UNIT)
        assert simulation.peaks == (peak,) * num_ranks
        assert simulate(schedule, EXCHANGING).makespan - 3 * num_micro_batches == exchanging
        assert max(simulate(schedule, EXCHANGING).idle) == published_idle(num_ranks, EXCHANGING)


def test_dualpipe_idles_by_the_published_formula_if_forward_and_backward_input_cost_the_same() -> None:
    # The law: with F = I >= W and no exchange, every rank idles exactly (P/2-1)(F&B+B-3W).
    generator = random.Random(1)
    for _ in range(120):
        num_ranks = generator.choice([2, 4, 6, 8, 10])
        forward = generator.uniform(1, 10)
        costs = without_exchange(forward, forward, generator.uniform(0, forward))
        schedule = build("dualpipe", num_ranks, 2 * num_ranks + 2 * generator.randrange(4))
        expected = published_idle(num_ranks, costs)
        assert simulate(schedule, costs).idle == pytest.approx((expected,) * num_ranks, abs=1e-9)


def test_dualpipe_idles_near_the_published_formula_for_other_costs() -> None:
    # With W <= min(F, I): off by at most (P/2-1)|F-I|, and by exactly (P/2-1)(F-I) if F >= I.
    generator = random.Random(2)
    for _ in range(120):
        num_ranks = generator.choice([2, 4, 6, 8])
        forward, backward_input = generator.uniform(1, 10), generator.uniform(1, 10)
        costs = without_exchange(forward, backward_input, generator.uniform(0, min(forward, backward_input)))
        idle = simulate(build("dualpipe", num_ranks, 2 * num_ranks + 2 * generator.randrange(4)), costs).idle
        assert idle == pytest.approx((idle[0],) * num_ranks, abs=1e-9)
        excess = idle[0] - published_idle(num_ranks, costs)
        slack = (num_ranks / 2 - 1) * (forward - backward_input)
        assert abs(excess) <= abs(slack) + 1e-9
        if forward >= backward_input:
            assert excess == pytest.approx(slack, abs=1e-9)


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8, 16])
def test_one_f_one_b_idles_by_the_textbook_formula(num_ranks: int) -> None:
    # (P - 1)(F + B), arXiv:2412.19437, table 2.
    for costs in (UNIT, without_exchange(2.5, 1.25, 3.0)):
        simulation = simulate(build("1f1b", num_ranks, 2 * num_ranks), costs)
        passage = costs.forward + costs.backward_input + costs.backward_weight
        assert simulation.idle == pytest.approx(((num_ranks - 1) * passage,) * num_ranks)


def test_dualpipe_has_link_latency_in_the_steady_state() -> None:
    late = Costs(forward=1, backward_input=1, backward_weight=1, exchange=0, latency=0.1)
    short, long = (simulate(build("dualpipe", 8, count), late).makespan for count in (64, 128))
    assert (long - short) / 64 - 3 == pytest.approx(0.0875, abs=1e-3)


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
    simulation = simulate(build("1f1b", 2, 1), costs)
    assert simulation.starts == ((0, 6), (1.5, 2.5))
    assert simulation.ends == ((1, 9), (2.5, 5.5))
    assert simulation.makespan == 9
    assert simulation.idle == (5, 5)
    assert simulation.bubble_fraction == pytest.approx(10 / 18)


def test_simulation_of_forwards_keeps_only_the_running_group() -> None:
    simulation = simulate(forward_only(build("dualpipe", 4, 8)), UNIT)
    assert simulation.peaks == (1, 1, 1, 1)


def test_simulation_rejects_a_deadlock() -> None:
    first, second = (Operation(Op.FORWARD, 0, stage, 0) for stage in (0, 1))
    schedule = Schedule(
        kind="any", num_ranks=1, num_micro_batches=1, placement=((0, 0),), ranks=(((second,), (first,)),)
    )
    with pytest.raises(ScheduleError, match=r"rank 0: F1\.0 never starts: deadlock"):
        simulate(schedule, UNIT)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_costs_reject_invalid_times(value: float) -> None:
    with pytest.raises(ScheduleError, match=r"costs\.latency: must be a finite time of at least 0"):
        Costs(forward=1, backward_input=1, backward_weight=1, exchange=0, latency=value)


@pytest.mark.parametrize("alone", [1.0, 0.8])
def test_exposed_exchange_is_that_of_lone_groups_also_if_they_compute_faster(alone: float) -> None:
    schedule = build("dualpipe", 4, 8)
    simulation = simulate(schedule, replace(uniform(EXCHANGING, 4, 4), alone=alone))
    # A pair computes for three units and exchanges for two, so only lone F and I (or B) expose their exchange.
    lone = [
        sum(len(group) == 1 and group[0].kind is not Op.BACKWARD_WEIGHT for group in rank) for rank in schedule.ranks
    ]
    assert simulation.exposed == pytest.approx(lone)
