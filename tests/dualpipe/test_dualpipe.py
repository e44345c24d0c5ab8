"""Mirroring turns a V on h ranks into a bidirectional pipeline on 2h ranks."""

from dataclasses import replace

import pytest

from dualpipe.generate.dualpipe import dualpipe, dualpipe_v, mirror
from dualpipe.generate.one_f_one_b import one_f_one_b
from dualpipe.generate.zero_bubble import zb_v
from dualpipe.ir import Op, Operation, Schedule, ScheduleError
from dualpipe.simulate.costs import Costs
from dualpipe.simulate.simulate import simulate
from dualpipe.validate import validate
from tests.dualpipe.random_schedules import random_schedule, v_shaped

EQUAL = Costs(forward=1, backward_input=1, backward_weight=1, exchange=0, latency=0)


def test_mirror_of_one_rank_gives_each_direction_to_both() -> None:
    groups = tuple(
        (Operation(kind, 0, stage, 0),)
        for kind, stage in [(Op.FORWARD, 0), (Op.FORWARD, 1), (Op.BACKWARD, 1), (Op.BACKWARD, 0)]
    )
    folded = Schedule(kind="v", num_ranks=1, num_micro_batches=1, placement=((0, 0),), ranks=(groups,))
    unfolded = mirror(folded)
    assert unfolded.placement == ((0, 1), (1, 0))
    assert (unfolded.kind, unfolded.num_ranks, unfolded.num_micro_batches) == ("v", 2, 2)
    printed = [" ".join("+".join(map(str, group)) for group in groups) for groups in unfolded.ranks]
    assert printed == ["F0.0 F1.0' B1.0' B0.0", "F0.0' F1.0 B1.0 B0.0'"]


@pytest.mark.parametrize("num_ranks", range(1, 6))
def test_mirror_of_dualpipe_v_is_dualpipe(num_ranks: int) -> None:
    for num_micro_batches in range(2 * num_ranks, 2 * num_ranks + 4):
        unfolded = mirror(dualpipe_v(num_ranks, num_micro_batches))
        assert replace(unfolded, kind="dualpipe") == dualpipe(2 * num_ranks, 2 * num_micro_batches)


@pytest.mark.parametrize("num_ranks", range(1, 7))
def test_mirror_of_zb_v_is_valid_for_every_size(num_ranks: int) -> None:
    for num_micro_batches in range(1, 2 * num_ranks + 3):
        validate(mirror(zb_v(num_ranks, num_micro_batches)), memory_cap=2 * num_ranks)


@pytest.mark.parametrize("num_ranks", range(1, 5))
def test_mirror_keeps_time_and_memory(num_ranks: int) -> None:
    for num_micro_batches in range(1, 2 * num_ranks + 3):
        for folded in (
            zb_v(num_ranks, num_micro_batches),
            random_schedule(v_shaped(num_ranks), num_micro_batches, seed=num_micro_batches),
        ):
            before, after = simulate(folded, EQUAL), simulate(mirror(folded), EQUAL)
            # On h ranks a stage is half of a rank's share of the model, on 2h ranks all of it.
            assert after.makespan == 2 * before.makespan
            peaks = tuple(2 * peak for peak in before.peaks)
            assert after.peaks == (*peaks, *reversed(peaks))


@pytest.mark.parametrize(
    ("schedule", "problem"),
    [
        (dualpipe(2, 4), r"^placement: schedule 'dualpipe' cannot be mirrored: must have one direction, has 2$"),
        (one_f_one_b(4, 4), r"^placement\[0\]: .*must have 2 stages per rank, 8, has 4$"),
        (
            replace(zb_v(2, 2), placement=((0, 1, 0, 1),)),
            r"^placement\[0\]\[2\]: .*in a V of 2 ranks it must be 1, is 0$",
        ),
        (replace(zb_v(2, 2), ranks=((), ((), (), ()), ())), r"^ranks: .*must have num_ranks = 2 entries, has 3$"),
        (
            replace(zb_v(2, 2), ranks=tuple(reversed(zb_v(2, 2).ranks))),
            r"^rank 0: group 0: .*F1\.0 belongs to a stage of another rank$",
        ),
    ],
)
def test_mirror_rejects_other_shapes(schedule: Schedule, problem: str) -> None:
    with pytest.raises(ScheduleError, match=problem):
        mirror(schedule)
