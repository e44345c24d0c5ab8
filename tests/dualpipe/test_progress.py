"""Schedules run on links of one message exactly if the validator accepts them, and the error describes the cycle."""

import random
from dataclasses import replace

import pytest

from dualpipe.generate.dualpipe import dualpipe, dualpipe_v, mirror
from dualpipe.generate.one_f_one_b import one_f_one_b
from dualpipe.generate.zero_bubble import zb_h1, zb_v
from dualpipe.ir import Group, Op, Operation, Schedule, ScheduleError
from dualpipe.passes import forward_only
from dualpipe.validate import validate
from tests.dualpipe.enactment import enact

SCHEDULES = [
    dualpipe(2, 4),
    dualpipe(4, 8),
    dualpipe(6, 14),
    one_f_one_b(2, 3),
    one_f_one_b(4, 6),
    dualpipe_v(3, 7),
    zb_h1(3, 5),
    zb_v(1, 2),
    zb_v(4, 5),
    mirror(zb_v(3, 4)),
]


def named(schedule: Schedule) -> str:
    return f"{schedule.kind}-{schedule.num_ranks}-{schedule.num_micro_batches}"


def two_ranks(first: tuple[Group, ...], second: tuple[Group, ...], num_micro_batches: int = 2) -> Schedule:
    return Schedule(
        kind="any",
        num_ranks=2,
        num_micro_batches=num_micro_batches,
        placement=((0, 1), (1, 0)),
        ranks=(first, second),
    )


def alone(*operations: tuple[Op, int, int, int]) -> tuple[Group, ...]:
    return tuple((Operation(*fields),) for fields in operations)


F, B, I, W = Op.FORWARD, Op.BACKWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT  # noqa: E741


def test_validator_describes_a_cycle_of_ranks() -> None:
    schedule = two_ranks(
        alone((F, 1, 1, 0), (F, 0, 0, 0), (B, 1, 1, 0), (B, 0, 0, 0)),
        alone((F, 0, 1, 0), (F, 1, 0, 0), (B, 0, 1, 0), (B, 1, 0, 0)),
    )
    expected = (
        r"^rank 0: deadlock: rank 0 at F1\.0' waits for activation 0\.0' from rank 1; "
        r"rank 1 at F1\.0 waits for activation 0\.0 from rank 0$"
    )
    with pytest.raises(ScheduleError, match=expected):
        validate(schedule)


def test_validator_finds_a_deadlock_that_only_rendezvous_sends_have() -> None:
    # Both ranks send two activations before either posts a receive: links that hold two messages would run it.
    schedule = two_ranks(
        alone((F, 0, 0, 0), (F, 0, 0, 1), (F, 1, 1, 0), (F, 1, 1, 1)),
        alone((F, 1, 0, 0), (F, 1, 0, 1), (F, 0, 1, 0), (F, 0, 1, 1)),
        num_micro_batches=4,
    )
    with pytest.raises(
        ScheduleError, match=r"cannot send activation 0\.1 before rank 1 posts the receive of activation 0\.0"
    ):
        validate(schedule, forward_only=True)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
def test_validated_schedules_end_on_links_of_one_message(schedule: Schedule) -> None:
    validate(schedule)
    for seed in range(3):
        assert enact(schedule, seed=seed).problem is None
        assert enact(forward_only(schedule), forward_only=True, seed=seed).problem is None


def with_unlike_neighbours_swapped(schedule: Schedule, draws: random.Random) -> Schedule:
    """Swaps four neighbors that use different links, which keeps the order on links."""
    lists = [list(groups) for groups in schedule.ranks]
    for _ in range(4):
        groups = draws.choice(lists)
        index = draws.randrange(len(groups) - 1)
        one, two = groups[index][0], groups[index + 1][0]
        if (one.kind, one.stage) != (two.kind, two.stage):
            groups[index], groups[index + 1] = groups[index + 1], groups[index]
    return replace(schedule, ranks=tuple(map(tuple, lists)))


def test_links_of_one_message_agree_with_the_validator_on_deadlocks() -> None:
    draws = random.Random(5)
    ended = stopped = stopped_sending = 0
    for number in range(200):
        mutant = with_unlike_neighbours_swapped(draws.choice(SCHEDULES), draws)
        problem = ""
        try:
            validate(mutant)
        except ScheduleError as error:
            problem = str(error)
        outcome = enact(mutant, seed=number).problem
        assert (outcome is None) == (not problem), f"{outcome=}, {problem=}"
        ended += not problem
        if "deadlock" in problem:
            assert "wait for ever" in str(outcome)
            stopped += 1
            stopped_sending += "cannot send" in problem
    assert ended >= 50
    assert stopped >= 8
    assert stopped_sending >= 4
