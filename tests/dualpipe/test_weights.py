"""Placing weight gradients keeps the order of F and I and the memory cap, and fills idle time."""

import random

import pytest

from dualpipe.generate.dualpipe import dualpipe
from dualpipe.generate.dualpipe_interleaved import empty
from dualpipe.generate.lockstep import lockstep
from dualpipe.generate.zero_bubble import zb_h1, zb_v
from dualpipe.ir import Op, Operation, Schedule
from dualpipe.optimize.weights import place_weights
from dualpipe.passes import split_backwards
from dualpipe.simulate.costs import Costs, uniform
from dualpipe.simulate.simulate import peak_memory, simulate
from dualpipe.validate import validate


def without_weights(schedule: Schedule) -> list[list[Operation]]:
    return [[op for group in groups for op in group if op.kind is not Op.BACKWARD_WEIGHT] for groups in schedule.ranks]


def samples() -> list[Schedule]:
    return [
        zb_h1(4, 9),
        zb_v(3, 7),
        split_backwards(dualpipe(4, 10)),
        lockstep(empty(5, 12), paired=True),
        lockstep(empty(6, 13), paired=False),
    ]


@pytest.mark.parametrize("patience", [0.0, 0.5, 1.0])
def test_placing_only_moves_weights(patience: float) -> None:
    generator = random.Random(4)
    for schedule in samples():
        for _ in range(4):
            times = [generator.uniform(0.5, 2) for _ in range(3)]
            costs = uniform(
                Costs(
                    forward=times[0],
                    backward_input=times[1],
                    backward_weight=times[2],
                    exchange=generator.choice([0, 0.4]),
                    latency=generator.choice([0, 0.3]),
                ),
                schedule.num_ranks,
                schedule.num_stages,
            )
            cap = max(peak_memory(schedule, costs)) + generator.randrange(3)
            placed = place_weights(schedule, costs, cap, patience)
            assert placed is not None
            validate(placed, cap)
            assert without_weights(placed) == without_weights(schedule)
            for groups in placed.ranks:
                operations = [op for group in groups for op in group]
                deferred = [op.with_kind(Op.BACKWARD_WEIGHT) for op in operations if op.kind is Op.BACKWARD_INPUT]
                assert [op for op in operations if op.kind is Op.BACKWARD_WEIGHT] == deferred


def test_placing_fills_waits_of_any_length() -> None:
    # Without patience a rank is never idle while a W waits: at the start of each idle time no W is left.
    costs = uniform(Costs(forward=1, backward_input=1.3, backward_weight=0.7, exchange=0, latency=0.2), 4, 4)
    placed = place_weights(zb_h1(4, 9), costs, 6.0)
    assert placed is not None
    simulation = simulate(placed, costs)
    for groups, starts, ends in zip(placed.ranks, simulation.starts, simulation.ends, strict=True):
        waiting = 0
        for index, group in enumerate(groups):
            idle = starts[index] - (ends[index - 1] if index else 0.0)
            assert waiting == 0 or idle < 1e-9
            waiting += {Op.BACKWARD_INPUT: 1, Op.BACKWARD_WEIGHT: -1}.get(group[0].kind, 0)


def test_placing_rejects_a_cap_below_the_need_of_the_order() -> None:
    costs = uniform(Costs(forward=1, backward_input=1, backward_weight=1, exchange=0, latency=0), 4, 4)
    assert place_weights(zb_h1(4, 9), costs, 3.0) is None
    assert place_weights(zb_h1(4, 9), costs, 4.0) is not None
