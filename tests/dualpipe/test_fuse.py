"""Fusing is valid, never worse, and reaches the promised overheads."""

import random

import pytest

from dualpipe.generate.dualpipe import dualpipe
from dualpipe.generate.dualpipe_interleaved import empty
from dualpipe.generate.lockstep import lockstep
from dualpipe.generate.zero_bubble import zb_h1, zb_v
from dualpipe.ir import Op, Schedule
from dualpipe.optimize.fuse import exchanges, fuse
from dualpipe.passes import split_backwards
from dualpipe.simulate.costs import Costs, uniform
from dualpipe.simulate.simulate import simulate
from dualpipe.validate import validate

SCHEDULES = [
    dualpipe(4, 8),
    split_backwards(dualpipe(4, 10)),
    zb_h1(3, 7),
    zb_v(3, 6),
    lockstep(empty(5, 9), paired=False),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: f"{schedule.kind}-{schedule.num_ranks}")
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


def test_fusing_does_nothing_without_exchange() -> None:
    schedule = split_backwards(dualpipe(4, 8))
    costs = uniform(Costs(forward=1, backward_input=2, backward_weight=1, exchange=0, latency=0), 4, 4)
    assert not exchanges(costs)
    assert fuse(schedule, costs) == schedule


@pytest.mark.parametrize(("num_ranks", "overhead"), [(4, 8), (8, 20), (16, 44)])
def test_fused_split_dualpipe_reaches_the_promised_overhead(num_ranks: int, overhead: int) -> None:
    costs = uniform(Costs(forward=1, backward_input=1, backward_weight=1, exchange=1, latency=0), num_ranks, num_ranks)
    fused = fuse(split_backwards(dualpipe(num_ranks, 2 * num_ranks)), costs)
    simulation = simulate(fused, costs)
    assert simulation.makespan - 6 * num_ranks == overhead
    assert max(simulation.peaks) <= num_ranks + 1
    assert any(len(group) == 2 and {op.kind for op in group} == {Op.FORWARD} for group in fused.ranks[0])


def test_fusing_many_ranks_changes_mirror_ranks_alike() -> None:
    costs = uniform(Costs(forward=1, backward_input=1, backward_weight=1, exchange=1, latency=0), 18, 18)
    schedule = lockstep(empty(18, 42), paired=True)
    fused = fuse(schedule, costs)
    validate(fused)
    assert simulate(fused, costs).makespan < simulate(schedule, costs).makespan - 5
    for rank in range(9):
        mirrored = [{(*op[2:], op.kind, 1 - op.direction) for op in group} for group in fused.ranks[17 - rank]]
        assert [{(*op[2:], op.kind, op.direction) for op in group} for group in fused.ranks[rank]] == mirrored
