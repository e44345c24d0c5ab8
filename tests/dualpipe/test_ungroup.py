"""Ungrouping gives the order of a rank that overlaps nothing."""

from dataclasses import replace
from itertools import groupby

import pytest

from dualpipe.ir import Op, Operation, Schedule
from dualpipe.passes import order_members, ungroup
from dualpipe.runtime.pairing import sequential
from dualpipe.runtime.program import Action
from dualpipe.simulate.costs import Costs
from dualpipe.simulate.simulate import simulate
from tests.dualpipe.adding import SCHEDULES, lower, name_of

UNIT = Costs(forward=1, backward_input=1, backward_weight=1, exchange=1, latency=0, offload=1)


def test_members_of_a_group_run_forwards_first_and_weights_last() -> None:
    names = ("W", "I", "F", "B", "F")
    group = tuple(Operation(Op(name), 0, 0, index) for index, name in enumerate(names))
    assert [(op.kind.value, op.micro_batch) for op in order_members(group)] == [
        ("F", 2),
        ("F", 4),
        ("I", 1),
        ("B", 3),
        ("W", 0),
    ]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name_of)
def test_ungroup_gives_the_order_of_a_rank_that_overlaps_nothing(schedule: Schedule) -> None:
    alone = ungroup(schedule)
    assert simulate(alone, UNIT).makespan > 0
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
