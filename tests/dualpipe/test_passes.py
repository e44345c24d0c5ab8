"""Passes keep schedules valid, are never worse by simulation, and repeat the steady state."""

import random

import pytest

from dualpipe.generate.dualpipe import dualpipe, dualpipe_v
from dualpipe.generate.one_f_one_b import one_f_one_b
from dualpipe.ir import Op, Schedule
from dualpipe.passes import is_no_worse, split_backwards, split_weights
from dualpipe.simulate.costs import Costs, uniform
from dualpipe.simulate.simulate import simulate
from dualpipe.validate import validate

SCHEDULES = [dualpipe(4, 10), dualpipe(6, 12), dualpipe_v(3, 7), one_f_one_b(4, 9)]
UNIT = Costs(forward=1, backward_input=1, backward_weight=1, exchange=0, latency=0)


def draw(generator: random.Random) -> Costs:
    return Costs(
        forward=generator.uniform(0.5, 2),
        backward_input=generator.uniform(0.5, 2),
        backward_weight=generator.uniform(0.2, 2),
        exchange=generator.choice([0, 0.5, 3]),
        latency=generator.choice([0, 0.2]),
    )


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.kind)
def test_split_is_valid_and_never_worse(schedule: Schedule) -> None:
    generator = random.Random(1)
    validate(split_backwards(schedule))
    for _ in range(20):
        costs = uniform(draw(generator), schedule.num_ranks, schedule.num_stages)
        split = split_weights(schedule, costs)
        new, old = simulate(split, costs), simulate(schedule, costs)
        assert new.makespan <= old.makespan * (1 + 1e-9)
        assert all(peak <= before + 1e-9 for peak, before in zip(new.peaks, old.peaks, strict=True))
        assert split in (schedule, split_backwards(schedule))


def test_split_is_rejected_if_it_hides_less() -> None:
    # F&B hides all of W's time under long exchange, F&I and then W does not.
    schedule = dualpipe(4, 16)
    costs = uniform(Costs(forward=1, backward_input=1, backward_weight=1, exchange=2, latency=0), 4, 4)
    assert not is_no_worse(split_backwards(schedule), schedule, costs)
    assert split_weights(schedule, costs) is schedule


@pytest.mark.parametrize("num_ranks", [2, 4, 8, 16])
def test_split_dualpipe_meets_the_lower_bound(num_ranks: int) -> None:
    split = split_weights(dualpipe(num_ranks, 2 * num_ranks), uniform(UNIT, num_ranks, num_ranks))
    assert simulate(split, UNIT).makespan - 6 * num_ranks == (num_ranks - 1) // 2


def test_split_leaves_no_full_backward_and_as_much_work() -> None:
    before, after = dualpipe(4, 10), split_backwards(dualpipe(4, 10))
    kinds = [op.kind for groups in after.ranks for group in groups for op in group]
    assert Op.BACKWARD not in kinds
    for kind in (Op.FORWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT):
        assert kinds.count(kind) == 4 * 10
    assert simulate(before, UNIT).idle[0] > simulate(after, UNIT).idle[0]
