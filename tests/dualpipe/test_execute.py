"""The interpreter frees tensors in time, and runs schedules on links of one message if the validator accepts them."""

import random
from dataclasses import replace

import pytest

from dualpipe.build import build
from dualpipe.generate.dualpipe import dualpipe, dualpipe_v, mirror
from dualpipe.generate.one_f_one_b import one_f_one_b
from dualpipe.generate.zero_bubble import zb_h1, zb_v
from dualpipe.ir import Group, Op, Operation, Schedule, ScheduleError
from dualpipe.passes import forward_only
from dualpipe.runtime.compile import Pairing
from dualpipe.runtime.pairing import overlapped
from dualpipe.simulate.timing import peak_activations
from dualpipe.validate import validate
from tests.dualpipe.adding import PAIRINGS, SCHEDULES, Ran, lanes_of, name_of, run_threads
from tests.dualpipe.enactment import enact


def assert_values(schedule: Schedule, ran: list[Ran], *, trained: bool) -> None:
    """Checks every micro-batch's output and input gradient in every stage."""
    numbers = range(schedule.num_stages)
    lanes = [lanes_of(stage, schedule.num_stages) for stage in numbers]
    added = [(stage + 1) * sum(10.0**phase for phase in range(len(lanes[stage]))) for stage in numbers]
    for direction in range(schedule.num_directions):
        for micro_batch in schedule.micro_batches_of(direction):
            start, key = (float(micro_batch), float(direction)), (direction, micro_batch)
            for number in numbers:
                stage = ran[schedule.rank_of(direction, number)].stages[number]
                assert stage.outputs[key] == [value + sum(added[: number + 1]) for value in start]
                doublings = sum(map(len, lanes[number:]))
                expected = [(value + sum(added)) * 2.0**doublings for value in start]
                assert stage.gradients.get(key) == (expected if trained else None)
                phases = [phase for phase, lane in enumerate(lanes[number]) if lane == "compute"]
                assert sorted(stage.weights.get(key, [])) == (phases if trained else [])


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=name_of)
def test_interpreter_computes_values_and_keeps_only_the_activations_of_the_schedule(
    schedule: Schedule, pairing: Pairing
) -> None:
    # The journals raise if a message or an activation is kept for too long.
    ran = run_threads(schedule, pairing)
    assert_values(schedule, ran, trained=True)
    peaks = peak_activations(schedule)
    assert tuple(rank.execution.peak_runs for rank in ran) == peaks
    assert tuple(rank.journal.peak for rank in ran) == peaks


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name_of)
def test_forward_only_program_keeps_at_most_a_group(schedule: Schedule) -> None:
    forwards = forward_only(schedule)
    ran = run_threads(forwards, overlapped)
    assert_values(forwards, ran, trained=False)
    assert all(rank.execution.peak_runs <= peak for rank, peak in zip(ran, peak_activations(forwards), strict=True))


def test_published_dualpipe_keeps_one_activation_more_than_ranks() -> None:
    ran = run_threads(build("dualpipe", 4, 8), overlapped)
    assert max(rank.journal.peak for rank in ran) == 5


PROGRESS_SCHEDULES = [
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
        kind="any", num_ranks=2, num_micro_batches=num_micro_batches, placement=((0, 1), (1, 0)), ranks=(first, second)
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


@pytest.mark.parametrize("schedule", PROGRESS_SCHEDULES, ids=named)
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
        mutant = with_unlike_neighbours_swapped(draws.choice(PROGRESS_SCHEDULES), draws)
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
