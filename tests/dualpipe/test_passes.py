"""Passes keep schedules valid, with as much work."""

import pytest

from dualpipe.generate.dualpipe import dualpipe, dualpipe_v
from dualpipe.generate.one_f_one_b import one_f_one_b
from dualpipe.ir import Op, Schedule
from dualpipe.passes import split_backwards
from dualpipe.simulate.costs import Costs
from dualpipe.simulate.simulate import simulate
from dualpipe.validate import validate

SCHEDULES = [dualpipe(4, 10), dualpipe(6, 12), dualpipe_v(3, 7), one_f_one_b(4, 9)]
UNIT = Costs(forward=1, backward_input=1, backward_weight=1, exchange=0, latency=0)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.kind)
def test_split_is_valid(schedule: Schedule) -> None:
    validate(split_backwards(schedule))


@pytest.mark.parametrize("num_ranks", [2, 4, 8, 16])
def test_split_dualpipe_meets_the_lower_bound(num_ranks: int) -> None:
    split = split_backwards(dualpipe(num_ranks, 2 * num_ranks))
    assert simulate(split, UNIT).makespan - 6 * num_ranks == (num_ranks - 1) // 2


def test_split_leaves_no_full_backward_and_as_much_work() -> None:
    before, after = dualpipe(4, 10), split_backwards(dualpipe(4, 10))
    kinds = [op.kind for groups in after.ranks for group in groups for op in group]
    assert Op.BACKWARD not in kinds
    for kind in (Op.FORWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT):
        assert kinds.count(kind) == 4 * 10
    assert simulate(before, UNIT).idle[0] > simulate(after, UNIT).idle[0]
