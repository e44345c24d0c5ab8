"""The timing of passes agrees with a fixed point of the timing rules."""

import random

import pytest

from dualpipe.generate.dualpipe import dualpipe
from dualpipe.generate.dualpipe_interleaved import empty
from dualpipe.generate.lockstep import lockstep
from dualpipe.generate.one_f_one_b import one_f_one_b
from dualpipe.generate.zero_bubble import zb_v
from dualpipe.ir import Op, Operation, Schedule
from dualpipe.simulate.costs import CostModel, Costs, StageCosts, uniform
from dualpipe.simulate.timing import Timing
from dualpipe.transfers import made_by, needed_by

SCHEDULES = [dualpipe(4, 10), zb_v(3, 5), one_f_one_b(5, 7), lockstep(empty(5, 9), paired=True)]


def random_costs(schedule: Schedule, generator: random.Random) -> CostModel:
    stages = tuple(
        StageCosts(
            forward=generator.uniform(0, 2),
            backward_input=generator.uniform(0, 2),
            backward_weight=generator.uniform(0, 2),
            forward_exchange=generator.choice([0.0, generator.uniform(0, 3)]),
            backward_exchange=generator.choice([0.0, generator.uniform(0, 3)]),
            activation=1.0,
        )
        for _ in range(schedule.num_stages)
    )
    return CostModel(stages=stages, latency=generator.choice([0.0, 0.4]))


def ends_by_relaxation(schedule: Schedule, costs: CostModel) -> dict[Operation, float]:
    """Raises every group's end to the value that the rules require, until nothing changes."""
    makers = {
        value: (op, rank)
        for rank, groups in enumerate(schedule.ranks)
        for group in groups
        for op in group
        if (value := made_by(op, schedule.num_stages)) is not None
    }
    ends = {op: 0.0 for groups in schedule.ranks for group in groups for op in group}
    changed = True
    while changed:
        changed = False
        for rank, groups in enumerate(schedule.ranks):
            free = 0.0
            for group in groups:
                start = free
                for op in group:
                    value = needed_by(op, schedule.num_stages)
                    if value is not None:
                        maker, source = makers[value]
                        start = max(start, ends[maker] + (costs.latency if source != rank else 0.0))
                    before = {Op.BACKWARD: Op.FORWARD, Op.BACKWARD_INPUT: Op.FORWARD, Op.BACKWARD_WEIGHT: None}
                    kind = before.get(op.kind)
                    if kind is not None:
                        start = max(start, ends[Operation(kind, op.direction, op.stage, op.micro_batch)])
                free = start + costs.duration_of(group)
                for op in group:
                    if ends[op] != free:
                        ends[op] = free
                        changed = True
    return ends


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.kind)
def test_timing_equals_the_rules_relaxed_to_a_fixed_point(schedule: Schedule) -> None:
    generator = random.Random(6)
    for _ in range(6):
        costs = random_costs(schedule, generator)
        timing = Timing(schedule, costs)
        ends = timing.run([timing.numbered(groups) for groups in schedule.ranks])
        assert dict(zip(timing.operations, ends, strict=True)) == pytest.approx(ends_by_relaxation(schedule, costs))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.kind)
def test_timing_in_parts_equals_timing_at_once(schedule: Schedule) -> None:
    timing = Timing(schedule, random_costs(schedule, random.Random(7)))
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


def test_timing_stops_exactly_below_the_makespan() -> None:
    schedule = dualpipe(4, 8)
    timing = Timing(
        schedule, uniform(Costs(forward=1, backward_input=1, backward_weight=1, exchange=1, latency=0), 4, 4)
    )
    ranks = [timing.numbered(groups) for groups in schedule.ranks]
    makespan = max(timing.run(ranks))
    assert timing.advance(ranks, timing.begin(ranks), limit=makespan)
    assert not timing.advance(ranks, timing.begin(ranks), limit=makespan - 0.5)


def test_timing_marks_operations_in_a_deadlock() -> None:
    forwards = tuple(Operation(Op.FORWARD, 0, stage, 0) for stage in (0, 1))
    schedule = Schedule(
        kind="any", num_ranks=1, num_micro_batches=1, placement=((0, 0),), ranks=(((forwards[1],), (forwards[0],)),)
    )
    timing = Timing(
        schedule, uniform(Costs(forward=1, backward_input=1, backward_weight=1, exchange=0, latency=0), 1, 2)
    )
    assert timing.run([timing.numbered(groups) for groups in schedule.ranks]) == [-1.0, -1.0]
