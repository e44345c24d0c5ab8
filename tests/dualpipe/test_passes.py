"""Passes keep schedules valid and memory caps, are never worse, and keep their promises."""

import random
from dataclasses import replace
from itertools import groupby

import pytest

from dualpipe.builder import build_schedule
from dualpipe.costs import Costs, uniform
from dualpipe.generate.dualpipe import dualpipe, dualpipe_v
from dualpipe.generate.dualpipe_interleaved import empty
from dualpipe.generate.lockstep import lockstep
from dualpipe.generate.one_f_one_b import one_f_one_b
from dualpipe.generate.zb1p import zb1p
from dualpipe.generate.zero_bubble import zb_v
from dualpipe.ir import Op, Schedule
from dualpipe.passes import fuse, place_weights, split_backwards, ungroup
from dualpipe.runtime.pairing import overlapped, sequential
from dualpipe.runtime.program import Action, first_use_order, reduction_order, with_reductions
from dualpipe.simulation import simulate
from dualpipe.validate import validate
from tests.dualpipe.adding import PUBLISHED, lower, name_of
from tests.dualpipe.adding import SCHEDULES as REDUCTIONS_SCHEDULES
from tests.dualpipe.adding import SCHEDULES as UNGROUP_SCHEDULES

SCHEDULES = [dualpipe(4, 10), dualpipe(6, 12), dualpipe_v(3, 7), one_f_one_b(4, 9)]
UNIT = Costs(forward=1, backward_input=1, backward_weight=1, exchange=0, latency=0)


@pytest.mark.parametrize("num_ranks", [2, 8])
def test_split_dualpipe_meets_the_lower_bound(num_ranks: int) -> None:
    split = split_backwards(dualpipe(num_ranks, 2 * num_ranks))
    assert simulate(split, UNIT).makespan - 6 * num_ranks == (num_ranks - 1) // 2


FUSE_SCHEDULES = [
    dualpipe(4, 8),
    split_backwards(dualpipe(4, 10)),
    zb1p(3, 7),
    zb_v(3, 6),
    lockstep(empty(5, 9), paired=False),
]


@pytest.mark.parametrize("schedule", FUSE_SCHEDULES, ids=lambda schedule: f"{schedule.kind}-{schedule.num_ranks}")
def test_fusing_is_valid_and_never_worse(schedule: Schedule) -> None:
    generator = random.Random(2)
    for _ in range(5):
        times = [generator.uniform(0.5, 2) for _ in range(3)]
        costs = uniform(
            Costs(
                forward=times[0],
                backward_input=times[1],
                backward_weight=times[2],
                exchange=generator.uniform(0.1, 2),
                latency=generator.choice([0, 0.2]),
            ),
            schedule.num_ranks,
            schedule.num_stages,
        )
        fused = fuse(schedule, costs)
        validate(fused)
        new, old = simulate(fused, costs), simulate(schedule, costs)
        assert new.makespan <= old.makespan * (1 + 1e-9)
        assert all(peak <= before + 1e-9 for peak, before in zip(new.peaks, old.peaks, strict=True))


def test_fusing_keeps_every_rank_in_order_and_groups_at_three() -> None:
    schedule = lockstep(empty(4, 9), paired=False)
    costs = uniform(Costs(forward=1, backward_input=1, backward_weight=1, exchange=1.5, latency=0), 4, 4)
    fused = fuse(schedule, costs)
    assert max(len(group) for groups in fused.ranks for group in groups) == 3
    for groups, before in zip(fused.ranks, schedule.ranks, strict=True):
        assert [op for group in groups for op in group] == [op for group in before for op in group]
        assert max(map(len, groups)) <= 3
        for group in groups:
            assert len({(op.direction, op.stage, op.micro_batch) for op in group}) == len(group)


@pytest.mark.parametrize(("num_ranks", "overhead"), [(4, 8), (8, 20)])
def test_fused_split_dualpipe_reaches_the_promised_overhead(num_ranks: int, overhead: int) -> None:
    costs = uniform(Costs(forward=1, backward_input=1, backward_weight=1, exchange=1, latency=0), num_ranks, num_ranks)
    fused = fuse(split_backwards(dualpipe(num_ranks, 2 * num_ranks)), costs)
    simulation = simulate(fused, costs)
    assert simulation.makespan - 6 * num_ranks == overhead
    assert max(simulation.peaks) <= num_ranks + 1
    assert any(len(group) == 2 and {op.kind for op in group} == {Op.FORWARD} for group in fused.ranks[0])


def test_placing_fills_waits_of_any_length() -> None:
    # Without patience a rank is never idle while a W waits: at the start of each idle time no W is left.
    costs = uniform(Costs(forward=1, backward_input=1.3, backward_weight=0.7, exchange=0, latency=0.2), 4, 4)
    placed = place_weights(zb1p(4, 9), costs, 6.0)
    assert placed is not None
    simulation = simulate(placed, costs)
    for groups, starts, ends in zip(placed.ranks, simulation.starts, simulation.ends, strict=True):
        waiting = 0
        for index, group in enumerate(groups):
            idle = starts[index] - (ends[index - 1] if index else 0.0)
            assert waiting == 0 or idle < 1e-9
            waiting += {Op.BACKWARD_INPUT: 1, Op.BACKWARD_WEIGHT: -1}.get(group[0].kind, 0)


UNGROUP_UNIT = Costs(forward=1, backward_input=1, backward_weight=1, exchange=1, latency=0, offload=1)


@pytest.mark.parametrize("schedule", UNGROUP_SCHEDULES, ids=name_of)
def test_ungroup_gives_the_order_of_a_rank_that_overlaps_nothing(schedule: Schedule) -> None:
    alone = ungroup(schedule)
    assert simulate(alone, UNGROUP_UNIT).makespan > 0
    assert replace(alone, ranks=schedule.ranks) == schedule
    letters = {Action.FORWARD: "F", Action.BACKWARD: "I", Action.WEIGHT: "W", Action.RELEASE: "O", Action.RELOAD: "R"}
    for rank, groups in enumerate(alone.ranks):
        assert all(len(group) == 1 for group in groups)
        steps = lower(schedule, rank, sequential).steps
        ran = [key for key, _ in groupby((letters[step.action], step.run) for step in steps if step.action in letters)]
        # A full backward interleaves weights and inputs: its inputs identify it.
        full = {(op.direction, op.stage, op.micro_batch) for (op,) in groups if op.kind is Op.BACKWARD}
        seen = [
            (letter, run)
            for letter, run in ran
            if not (letter == "W" and (run.direction, run.stage, run.micro_batch) in full)
        ]
        order = [key for key, _ in groupby(seen)]
        assert [(letter, run.direction, run.stage, run.micro_batch) for letter, run in order] == [
            ("I" if op.kind is Op.BACKWARD else op.kind.value, op.direction, op.stage, op.micro_batch)
            for (op,) in groups
        ]


COSTS = Costs(forward=1.0, backward_input=1.0, backward_weight=1.0, exchange=1.0, latency=0.0)
SIZES = ((2, 4), (4, 8), (6, 16), (8, 24))

MIRRORED = [
    *(build_schedule(kind, *sizes) for kind in ("dualpipe", "dualpipe_split") for sizes in SIZES),
    *(build_schedule("dualpipe_interleaved", *sizes, uniform(COSTS, sizes[0], 2 * sizes[0])) for sizes in SIZES[:2]),
]


@pytest.mark.parametrize("schedule", REDUCTIONS_SCHEDULES, ids=name_of)
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
    most = 3 if schedule.kind in ("dualpipe_interleaved", "dualpipe_split") else 0
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
