"""The timing of passes may be split, and stops at a limit or a deadlock; `test_event_clock` checks its times."""

from random import Random

import pytest

from dualpipe.generate.dualpipe import dualpipe
from dualpipe.generate.dualpipe_interleaved import empty
from dualpipe.generate.lockstep import lockstep
from dualpipe.generate.one_f_one_b import one_f_one_b
from dualpipe.generate.zero_bubble import zb_v
from dualpipe.ir import Op, Operation, Schedule
from dualpipe.simulate.costs import Costs, uniform
from dualpipe.simulate.timing import Timing
from tests.dualpipe.random_schedules import random_costs

SCHEDULES = [dualpipe(4, 10), zb_v(3, 5), one_f_one_b(5, 7), lockstep(empty(5, 9), paired=True)]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.kind)
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
