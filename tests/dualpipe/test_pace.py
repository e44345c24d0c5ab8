"""The steady state: what repeats, how long it takes, what limits it, and where the rest is lost."""

import pytest

from dualpipe.build import build
from dualpipe.ir import Op
from dualpipe.registry import SCHEDULES
from dualpipe.simulate.costs import CostModel, Costs, uniform
from dualpipe.simulate.pace import Pace, pace_of
from dualpipe.simulate.simulate import simulate


def costs_of(num_stages: int, exchange: float = 0.0, latency: float = 0.0) -> CostModel:
    times = Costs(forward=1, backward_input=1, backward_weight=1, exchange=exchange, latency=latency)
    return uniform(times, 4, num_stages)


def state_of(kind: str, exchange: float = 0.0, latency: float = 0.0, cap: float | None = None) -> Pace:
    costs = costs_of(SCHEDULES.get(kind).num_stages(4), exchange, latency)
    schedule = build(kind, 4, 32, costs)
    state = pace_of(schedule, costs, simulate(schedule, costs), cap)
    assert state is not None
    return state


@pytest.mark.parametrize("exchange", [0.0, 1.0])
@pytest.mark.parametrize("kind", SCHEDULES.names())
def test_losses_of_a_rank_are_its_time_without_computation(kind: str, exchange: float) -> None:
    costs = costs_of(SCHEDULES.get(kind).num_stages(4), exchange)
    schedule = build(kind, 4, 32, costs)
    simulation = simulate(schedule, costs)
    state = pace_of(schedule, costs, simulation)
    assert state is not None
    for rank in state.ranks:
        assert sum(rank.losses) == pytest.approx(simulation.makespan - 32 * rank.work)
        assert rank.length >= rank.work - 1e-9


def test_groups_of_1f1b_repeat_with_one_forward_and_one_backward() -> None:
    for rank in state_of("1f1b").ranks:
        assert sorted(op.kind for group in rank.groups for op in group) == [Op.BACKWARD, Op.FORWARD]
        assert rank.length == pytest.approx(3)


def test_limit_is_the_lane_that_is_full() -> None:
    assert state_of("zb_v").limit.startswith("computation")
    assert state_of("dualpipe", exchange=6.0).limit.startswith("exchange: rank ")


def test_limit_is_the_cost_without_which_the_order_is_shorter() -> None:
    assert state_of("dualpipe", exchange=1.0, latency=0.5).limit.startswith("latency: without it, this order would")
    assert state_of("1f1b", exchange=1.0).limit.startswith("exchange that groups do not hide")


def test_schedule_with_few_micro_batches_has_no_steady_state() -> None:
    costs = costs_of(4)
    schedule = build("1f1b", 4, 1)
    assert pace_of(schedule, costs, simulate(schedule, costs)) is None
