"""Programs start the reduction of every stage once, when its gradients are complete, in one order on all ranks."""

import pytest

from dualpipe.build import build
from dualpipe.ir import Op, Schedule
from dualpipe.runtime.pairing import overlapped
from dualpipe.runtime.program import Action, first_use_order, reduction_order, with_reductions
from dualpipe.simulate.costs import Costs, uniform
from tests.dualpipe.adding import PUBLISHED, SCHEDULES, lower, name_of

COSTS = Costs(forward=1.0, backward_input=1.0, backward_weight=1.0, exchange=1.0, latency=0.0)
SIZES = ((2, 4), (4, 8), (6, 16), (8, 24))
MIRRORED = [
    *(build(kind, *sizes) for kind in ("dualpipe", "dualpipe_split") for sizes in SIZES),
    *(build("dualpipe_interleaved", *sizes, uniform(COSTS, sizes[0], 2 * sizes[0])) for sizes in SIZES),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name_of)
def test_every_stage_is_reduced_once_and_directly_after_its_last_backward(schedule: Schedule) -> None:
    for rank in range(schedule.num_ranks):
        program = lower(schedule, rank, overlapped)
        steps = with_reductions(program).steps
        assert [step for step in steps if step.action is not Action.REDUCE] == list(program.steps)
        assert sorted(reduced(schedule, rank)) == sorted({stage for _, stage in schedule.stages_of(rank)})
        for index, step in enumerate(steps):
            if step.action is Action.REDUCE:
                assert (steps[index - 1].action, steps[index - 1].run) == (Action.FINISH, step.run)
                assert all(later.run.stage != step.run.stage for later in steps[index + 1 :])


def reduced(schedule: Schedule, rank: int) -> list[int]:
    """Returns the stages of a rank in the order in which they finish."""
    return [
        step.run.stage
        for step in with_reductions(lower(schedule, rank, overlapped)).steps
        if step.action is Action.REDUCE
    ]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name_of)
def test_orders_hold_every_stage_once(schedule: Schedule) -> None:
    assert sorted(reduction_order(schedule)) == sorted(first_use_order(schedule)) == list(range(schedule.num_stages))


@pytest.mark.parametrize("schedule", PUBLISHED, ids=name_of)
def test_rank_that_shares_no_stage_reduces_in_the_order_in_which_it_finishes(schedule: Schedule) -> None:
    ranks = [{stage for _, stage in schedule.stages_of(rank)} for rank in range(schedule.num_ranks)]
    for rank, held in enumerate(ranks):
        if all(held.isdisjoint(other) for index, other in enumerate(ranks) if index != rank):
            assert [stage for stage in reduction_order(schedule) if stage in held] == reduced(schedule, rank)
            (first, *_), *_ = schedule.ranks[rank]
            assert next(stage for stage in first_use_order(schedule) if stage in held) == first.stage


@pytest.mark.parametrize("schedule", MIRRORED, ids=name_of)
def test_mirror_ranks_finish_stages_in_the_order_of_their_reductions(schedule: Schedule) -> None:
    """No reduction waits for another one of its rank; in an order found by search, at most for three groups."""
    most = 3 if schedule.kind == "dualpipe_interleaved" else 0
    for rank in range(schedule.num_ranks):
        assert max(waited_groups(schedule, rank)) <= most


def waited_groups(schedule: Schedule, rank: int) -> list[int]:
    """Returns for each stage of a rank the groups that run between its end and the start of its reduction."""
    ends = {
        op.stage: index
        for index, group in enumerate(schedule.ranks[rank])
        for op in group
        if op.kind in (Op.BACKWARD, Op.BACKWARD_WEIGHT)
    }
    started, waited = 0, []
    for stage in reduction_order(schedule):
        if stage in ends:
            started = max(started, ends[stage])
            waited.append(started - ends[stage])
    return waited
