"""More micro-batches by the steady state: the same as making them, or at least the same time per micro-batch."""

from dataclasses import replace

import pytest

from dualpipe.generate.dualpipe import dualpipe
from dualpipe.generate.dualpipe_split import empty
from dualpipe.generate.lockstep import lockstep
from dualpipe.generate.one_f_one_b import one_f_one_b
from dualpipe.generate.repeat import repeat
from dualpipe.generate.zero_bubble import zb_v
from dualpipe.optimize.fuse import fuse
from dualpipe.simulate.costs import Costs, uniform
from dualpipe.simulate.memory import peak_activations
from dualpipe.simulate.simulate import simulate
from dualpipe.validate import validate


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_repeating_a_generated_order_gives_the_generated_order(num_ranks: int) -> None:
    assert repeat(dualpipe(num_ranks, 4 * num_ranks), 6 * num_ranks + 2) == dualpipe(num_ranks, 6 * num_ranks + 2)
    for count in (3 * num_ranks, 3 * num_ranks + 1):
        longer = lockstep(empty(num_ranks, count + 10), paired=True)
        assert repeat(lockstep(empty(num_ranks, count), paired=True), count + 10) == longer
    assert repeat(one_f_one_b(num_ranks, 3 * num_ranks), 40) == one_f_one_b(num_ranks, 40)
    assert repeat(zb_v(num_ranks, 4 * num_ranks), 40) == zb_v(num_ranks, 40)


@pytest.mark.parametrize(("num_ranks", "count"), [(4, 12), (4, 13), (5, 16), (8, 24), (7, 22)])
def test_repeating_adds_nothing_but_work_to_a_fused_order(num_ranks: int, count: int) -> None:
    costs = uniform(Costs(forward=1, backward_input=1, backward_weight=1, exchange=1, latency=0), num_ranks, num_ranks)
    few = fuse(lockstep(empty(num_ranks, count), paired=True), costs)
    many = repeat(few, count + 60)
    assert many is not None
    validate(many)
    assert simulate(many, costs).makespan - simulate(few, costs).makespan == 3 * 60
    assert peak_activations(many) == peak_activations(few)


def test_repeating_works_where_only_the_ends_split_their_backwards() -> None:
    assert repeat(dualpipe(4, 12), 40) == dualpipe(4, 40)


def test_repeating_tells_what_it_cannot_do() -> None:
    schedule = dualpipe(4, 12)
    assert repeat(schedule, 12) == schedule
    assert repeat(schedule, 10) is None
    assert repeat(schedule, 15) is None
    without_middle = replace(schedule, ranks=tuple(groups[:6] for groups in schedule.ranks))
    assert repeat(without_middle, 40) is None
