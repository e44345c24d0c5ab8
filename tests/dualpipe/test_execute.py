"""The interpreter computes the values of one rank and frees tensors in time; the validator describes deadlocks."""

from collections import Counter, deque
from dataclasses import replace

import pytest

from dualpipe.builder import build_schedule
from dualpipe.ir import MOST_LINK_DEPTH, Group, Link, Op, Operation, Schedule, ScheduleError
from dualpipe.passes import forward_only
from dualpipe.runtime.compile import Pairing
from dualpipe.runtime.pairing import overlapped, sequential
from dualpipe.runtime.program import MOST_AHEAD, Action, Step
from dualpipe.simulation import peak_activations
from dualpipe.validate import validate
from tests.dualpipe.adding import (
    PAIRINGS,
    PUBLISHED,
    SCHEDULES,
    LaneClock,
    Ran,
    lanes_of,
    lower,
    name_of,
    run_threads,
)
from tests.dualpipe.random_schedules import bidirectional, random_schedule


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


@pytest.mark.slow
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


_PHASES = (Action.FORWARD, Action.BACKWARD, Action.WEIGHT)


def test_host_runs_few_phases_ahead_of_the_lane_and_leaves_nothing_running() -> None:
    for schedule in PUBLISHED:
        clocks = [LaneClock() for _ in range(schedule.num_ranks)]
        run_threads(schedule, overlapped, clocks)
        for rank, clock in enumerate(clocks):
            num_phases = sum(step.action in _PHASES for step in lower(schedule, rank, overlapped).steps)
            assert clock.num_waits == max(0, num_phases - MOST_AHEAD)
            assert not clock.is_running


def test_both_kinds_of_messages_of_one_way_have_no_common_order() -> None:
    """So each kind of link has a separate communicator: one of NCCL's has the same order on both ends."""
    schedule = build_schedule("dualpipe", 6, 16)
    orders = [
        [step.message for step in lower(schedule, rank, sequential).steps if step.action is action]
        for rank, action in ((0, Action.SEND), (1, Action.RECEIVE))
    ]
    sent, needed = ([message for message in order if message and message.link[:2] == (0, 1)] for order in orders)
    assert sent != needed
    for kind in ("activation", "gradient"):
        assert [each for each in sent if each.kind == kind] == [each for each in needed if each.kind == kind]


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
    # Both ranks send two activations before either posts a receive: links that hold two messages run it.
    schedule = two_ranks(
        alone((F, 0, 0, 0), (F, 0, 0, 1), (F, 1, 1, 0), (F, 1, 1, 1)),
        alone((F, 1, 0, 0), (F, 1, 0, 1), (F, 0, 1, 0), (F, 0, 1, 1)),
        num_micro_batches=4,
    )
    expected = (
        r"cannot send activation 0\.1 before rank 1 posts the receive of activation 0\.0.*; "
        r"nearest valid: schedule\.link_depth=2$"
    )
    with pytest.raises(ScheduleError, match=expected):
        validate(schedule, forward_only=True)
    validate(replace(schedule, link_depth=2), forward_only=True)


@pytest.mark.parametrize("link_depth", range(1, MOST_LINK_DEPTH + 1))
def test_valid_schedule_runs_if_a_message_waits_until_earlier_ones_of_its_link_have_posted_receives(
    link_depth: int,
) -> None:
    """The receives of the program are all that a link holds, as on NCCL."""
    deep = [random_schedule(bidirectional(3, 2), 6, seed, link_depth=link_depth) for seed in range(3)]
    for proven in (*(replace(schedule, link_depth=link_depth) for schedule in SCHEDULES), *deep):
        transfers_left = [
            deque(step for step in lower(proven, rank, overlapped).steps if is_transfer(step))
            for rank in range(proven.num_ranks)
        ]
        posted, sent, taken = Counter[Link](), Counter[Link](), Counter[Link]()
        is_moving = True
        while is_moving:
            is_moving = False
            for steps in transfers_left:
                while steps:
                    step = steps[0]
                    assert step.message is not None
                    link = step.message.link
                    # A send waits for the post of those before it, an acceptance for the message.
                    after, before = {
                        Action.RECEIVE: (posted, None),
                        Action.SEND: (sent, posted),
                        Action.ACCEPT: (taken, sent),
                    }[step.action]
                    if before is not None and before[link] < after[link] + (after is taken):
                        break
                    after[link] += 1
                    steps.popleft()
                    is_moving = True
        assert not any(transfers_left)


def is_transfer(step: Step) -> bool:
    return step.action in (Action.RECEIVE, Action.SEND, Action.ACCEPT) and (
        step.message is not None and step.message.source != step.message.destination
    )
