"""Schedules are lengthened by their steady state: valid, with only work added."""

import pytest

from dualpipe.generate.dualpipe import dualpipe, dualpipe_v
from dualpipe.generate.dualpipe_interleaved import empty
from dualpipe.generate.lockstep import lockstep
from dualpipe.generate.one_f_one_b import one_f_one_b
from dualpipe.generate.steady import lengthen
from dualpipe.ir import Schedule
from dualpipe.optimize.fuse import fuse
from dualpipe.simulate.costs import Costs, uniform
from dualpipe.simulate.simulate import peak_activations, simulate
from dualpipe.validate import validate

UNIT = Costs(forward=1, backward_input=1, backward_weight=1, exchange=0, latency=0)
EXCHANGING = Costs(forward=1, backward_input=1, backward_weight=1, exchange=1, latency=0)


def longer(schedule: Schedule, num_micro_batches: int) -> Schedule | None:
    costs = uniform(UNIT, schedule.num_ranks, schedule.num_stages)
    return lengthen(schedule, costs, num_micro_batches, (1, 2))


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_lengthened_order_is_the_generated_order(num_ranks: int) -> None:
    assert longer(dualpipe(num_ranks, 4 * num_ranks), 6 * num_ranks + 2) == dualpipe(num_ranks, 6 * num_ranks + 2)
    for count in (4 * num_ranks, 4 * num_ranks + 1):
        expected = lockstep(empty(num_ranks, count + 10), paired=True)
        assert longer(lockstep(empty(num_ranks, count), paired=True), count + 10) == expected
    assert longer(one_f_one_b(num_ranks, 3 * num_ranks), 40) == one_f_one_b(num_ranks, 40)
    assert longer(dualpipe_v(num_ranks, 4 * num_ranks), 40) == dualpipe_v(num_ranks, 40)


@pytest.mark.parametrize(("num_ranks", "count"), [(4, 16), (5, 20), (8, 28)])
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
