"""An independent proof agrees with the validator on deadlocks, and the error describes the cycle."""

import random
from dataclasses import replace
from graphlib import CycleError, TopologicalSorter

import pytest

from dualpipe.generate.dualpipe import dualpipe, mirror
from dualpipe.generate.dualpipe_v import dualpipe_v
from dualpipe.generate.one_f_one_b import one_f_one_b
from dualpipe.generate.zero_bubble import zb_h1, zb_v
from dualpipe.ir import Group, Op, Operation, Schedule, ScheduleError
from dualpipe.passes import forward_only
from dualpipe.transfers import Link, Message, transfers
from dualpipe.validate import validate
from tests.dualpipe.random_schedules import bidirectional, looped, random_schedule, v_shaped
from tests.dualpipe.synchronous_links import StuckError, run_on_threads

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
NEEDS_OF_THE_SAME_STAGE = {
    Op.BACKWARD: Op.FORWARD,
    Op.BACKWARD_INPUT: Op.FORWARD,
    Op.BACKWARD_WEIGHT: Op.BACKWARD_INPUT,
}


def can_run(schedule: Schedule) -> bool:
    """Proves independently that a complete schedule can run: links are in order, events are acyclic.

    Events: a rank reaches a group and posts its receives, it has run the group, a message is sent. A message follows
    its group, the rank's previous message, and the posted receive of the link's previous message.
    """
    graph: dict[object, set[object]] = {}
    reached: dict[Message, object] = {}
    received: dict[Link, list[Message]] = {}
    ranks = transfers(schedule)
    for number, rank in enumerate(ranks):
        for index, messages in enumerate(rank.receives):
            for message in messages:
                reached[message] = ("reach", number, index)
                received.setdefault(message.link, []).append(message)
    made = {
        op: (number, index)
        for number, groups in enumerate(schedule.ranks)
        for index, g in enumerate(groups)
        for op in g
    }
    for number, rank in enumerate(ranks):
        sent: dict[Link, list[Message]] = {}
        before: object = "start"
        for index, group in enumerate(schedule.ranks[number]):
            graph[("reach", number, index)] = {before}
            graph[("run", number, index)] = {("reach", number, index), *rank.receives[index]}
            for op in group:
                if op.kind in NEEDS_OF_THE_SAME_STAGE:
                    needed = op.with_kind(NEEDS_OF_THE_SAME_STAGE[op.kind])
                    graph[("run", number, index)].add(("run", *made[needed]))
                step = {Op.FORWARD: -1, Op.BACKWARD_WEIGHT: 0}.get(op.kind, 1)
                for kind in (op.kind,) if op.kind is Op.FORWARD else (Op.BACKWARD, Op.BACKWARD_INPUT):
                    # A neighboring stage on the same rank sends no message; it must have run.
                    neighbor = Operation(kind, op.direction, op.stage + step, op.micro_batch)
                    if step and neighbor in made and made[neighbor][0] == number:
                        graph[("run", number, index)].add(("run", *made[neighbor]))
            before = ("run", number, index)
            for message in rank.sends[index]:
                queue = sent.setdefault(message.link, [])
                graph[message] = {before} | ({reached[queue[-1]]} if queue else set())
                queue.append(message)
                before = message
        if any(queue != received[link] for link, queue in sent.items()):
            return False
    try:
        TopologicalSorter(graph).prepare()
    except CycleError:
        return False
    return True


def is_valid(schedule: Schedule) -> bool:
    try:
        validate(schedule)
    except ScheduleError:
        return False
    return True


def named(schedule: Schedule) -> str:
    return f"{schedule.kind}-{schedule.num_ranks}-{schedule.num_micro_batches}"


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
def test_validator_agrees_with_an_independent_proof_on_reordered_groups(schedule: Schedule) -> None:
    generator = random.Random(3)
    verdicts = set()
    for _ in range(80):
        lists = [list(groups) for groups in schedule.ranks]
        for _ in range(generator.choice([1, 1, 2, 3])):
            groups = generator.choice(lists)
            if generator.random() < 0.5:
                index = generator.randrange(len(groups) - 1)
                groups[index], groups[index + 1] = groups[index + 1], groups[index]
            else:
                groups.insert(generator.randrange(len(groups)), groups.pop(generator.randrange(len(groups))))
        mutant = replace(schedule, ranks=tuple(map(tuple, lists)))
        verdict = is_valid(mutant)
        assert verdict == can_run(mutant)
        verdicts.add(verdict)
    assert verdicts == {True, False}


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


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "schedule",
    [
        *SCHEDULES,
        random_schedule(bidirectional(3), 5, seed=0),
        random_schedule(v_shaped(3), 5, seed=1),
        random_schedule(looped(3, 2), 5, seed=2),
    ],
    ids=named,
)
def test_validated_schedules_end_on_synchronous_links(schedule: Schedule, seed: int) -> None:
    validate(schedule)
    run_on_threads(schedule, seed)
    run_on_threads(forward_only(schedule), seed)


def test_synchronous_links_deadlock_if_the_validator_rejects() -> None:
    waiting_for_sends = two_ranks(
        alone((F, 0, 0, 0), (F, 0, 0, 1), (F, 1, 1, 0), (F, 1, 1, 1)),
        alone((F, 1, 0, 0), (F, 1, 0, 1), (F, 0, 1, 0), (F, 0, 1, 1)),
        num_micro_batches=4,
    )
    with pytest.raises(StuckError):
        run_on_threads(waiting_for_sends, seed=0)


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


@pytest.mark.slow
def test_synchronous_links_agree_with_the_validator_on_deadlocks() -> None:
    draws = random.Random(5)
    ended = stopped = stopped_sending = 0
    for number in range(200):
        mutant = with_unlike_neighbours_swapped(draws.choice(SCHEDULES), draws)
        problem = ""
        try:
            validate(mutant)
        except ScheduleError as error:
            problem = str(error)
        if not problem:
            run_on_threads(mutant, number)
            ended += 1
        elif "deadlock" in problem:
            with pytest.raises(StuckError):
                run_on_threads(mutant, number)
            stopped += 1
            stopped_sending += "cannot send" in problem
    assert ended >= 50
    assert stopped >= 8
    assert stopped_sending >= 4
