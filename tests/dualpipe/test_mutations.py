"""The validator rejects exactly the mutations of valid schedules that compute wrong results."""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest

from dualpipe.build import build
from dualpipe.generate.dualpipe import dualpipe, dualpipe_v, mirror
from dualpipe.generate.one_f_one_b import one_f_one_b
from dualpipe.generate.zero_bubble import zb_h1, zb_v
from dualpipe.ir import Operation, Schedule, ScheduleError
from dualpipe.passes import forward_only
from dualpipe.validate import validate
from tests.dualpipe.enactment import enact
from tests.dualpipe.random_schedules import bidirectional, looped, offloaded, random_schedule, v_shaped

Lists = list[list[list[Operation]]]
Mutation = Callable[[Lists, random.Random], None]
MUTANTS_PER_SCHEDULE = 20


@cache
def schedules() -> tuple[Schedule, ...]:
    """Yields schedules of all kinds, sizes and groups, including three forward-only ones."""
    published = [
        *(one_f_one_b(*size) for size in ((1, 2), (2, 3), (4, 6))),
        *(zb_h1(*size) for size in ((2, 2), (3, 5), (4, 8))),
        *(zb_v(*size) for size in ((1, 3), (2, 3), (3, 7), (4, 4))),
        *(dualpipe(*size) for size in ((2, 4), (4, 8), (6, 14))),
        *(dualpipe_v(*size) for size in ((1, 2), (2, 5), (3, 7))),
        build("dualpipe_split", 3, 5),
        build("dualpipe_split", 5, 7),
        mirror(zb_v(2, 3)),
        mirror(zb_v(3, 4)),
    ]
    drawn = [
        random_schedule(bidirectional(3), 5, seed=0),
        random_schedule(bidirectional(5), 4, seed=1),
        random_schedule(v_shaped(3), 3, seed=2),
        random_schedule(looped(2, 3), 3, seed=3),
        random_schedule(((0, 0, 1, 0), (1, 2, 2, 0)), 5, seed=4),
    ]
    moved = [offloaded(schedule, 3) for schedule in (one_f_one_b(3, 4), dualpipe(4, 8), drawn[2], drawn[4])]
    return (*published, *drawn, *moved, *map(forward_only, (dualpipe(4, 8), zb_v(2, 4), drawn[0])))


def is_training(schedule: Schedule) -> bool:
    return any(op.kind.value != "F" for groups in schedule.ranks for group in groups for op in group)


def somewhere(lists: Lists, draws: random.Random, rank: int | None = None) -> tuple[int, int, int]:
    rank = draws.randrange(len(lists)) if rank is None else rank
    group = draws.randrange(len(lists[rank]))
    return rank, group, draws.randrange(len(lists[rank][group]))


def put(groups: list[list[Operation]], operation: Operation, draws: random.Random) -> None:
    """Inserts an operation anywhere in the rank, as a new group or into an existing one."""
    if groups and draws.random() < 0.3:
        group = draws.choice(groups)
        group.insert(draws.randrange(len(group) + 1), operation)
    else:
        groups.insert(draws.randrange(len(groups) + 1), [operation])


def drop(lists: Lists, draws: random.Random) -> None:
    rank, group, member = somewhere(lists, draws)
    del lists[rank][group][member]


def double(lists: Lists, draws: random.Random) -> None:
    rank, group, member = somewhere(lists, draws)
    put(lists[rank], lists[rank][group][member], draws)


def swap(lists: Lists, draws: random.Random) -> None:
    rank, group, member = somewhere(lists, draws)
    _, other, place = somewhere(lists, draws, rank)
    one, two = lists[rank][group][member], lists[rank][other][place]
    lists[rank][group][member], lists[rank][other][place] = two, one


def swap_neighbors(lists: Lists, draws: random.Random) -> None:
    rank = draws.randrange(len(lists))
    first = draws.randrange(max(1, len(lists[rank]) - 1))
    lists[rank][first : first + 2] = lists[rank][first : first + 2][::-1]


def move(lists: Lists, draws: random.Random) -> None:
    rank, group, member = somewhere(lists, draws)
    operation = lists[rank][group].pop(member)
    lists[rank] = [kept for kept in lists[rank] if kept]
    put(lists[rank], operation, draws)


def move_a_little(lists: Lists, draws: random.Random) -> None:
    rank, group, member = somewhere(lists, draws)
    operation = lists[rank][group].pop(member)
    lists[rank].insert(max(0, group + draws.choice([-3, -2, -1, 2, 3, 4])), [operation])


def move_to_another_rank(lists: Lists, draws: random.Random) -> None:
    rank, group, member = somewhere(lists, draws)
    operation = lists[rank][group].pop(member)
    if len(lists) > 1:
        put(lists[draws.choice([other for other in range(len(lists)) if other != rank])], operation, draws)


def regroup(lists: Lists, draws: random.Random) -> None:
    """Merges neighboring groups, splits a group, or reorders its members."""
    rank, group, _ = somewhere(lists, draws)
    groups = lists[rank]
    if len(groups[group]) > 1 and draws.random() < 0.6:
        members = draws.sample(groups[group], len(groups[group]))
        groups[group : group + 1] = draws.choice([[members], [[member] for member in members]])
    else:
        end = group + draws.choice([2, 2, 3])
        groups[group:end] = [[operation for joined in groups[group:end] for operation in joined]]


def rename(lists: Lists, draws: random.Random) -> None:
    """Swaps two micro-batches of a direction: from some rank on, or everywhere, which changes nothing."""
    one = lists[0][0][0]
    flow = [op for groups in lists for group in groups for op in group if op.direction == one.direction]
    two = draws.choice([op for op in flow if op.micro_batch != one.micro_batch])
    names = {one.micro_batch: two.micro_batch, two.micro_batch: one.micro_batch}
    for groups in lists[draws.choice([0, draws.randrange(len(lists)), draws.randrange(len(lists))]) :]:
        for group in groups:
            group[:] = [
                op._replace(micro_batch=names.get(op.micro_batch, op.micro_batch))
                if op.direction == one.direction
                else op
                for op in group
            ]


def mutant_of(schedule: Schedule, mutate: Mutation, draws: random.Random) -> Schedule:
    lists = [[list(group) for group in groups] for groups in schedule.ranks]
    mutate(lists, draws)
    return replace(schedule, ranks=tuple(tuple(tuple(group) for group in groups if group) for groups in lists))


def refusal(schedule: Schedule, training: bool, memory_cap: float | None = None) -> str | None:
    try:
        validate(schedule, memory_cap, forward_only=not training)
    except ScheduleError as error:
        return str(error)
    return None


def test_oracle_accepts_every_original() -> None:
    for schedule in schedules():
        training = is_training(schedule)
        assert enact(schedule, forward_only=not training).problem is None
        assert refusal(schedule, training) is None


@pytest.mark.parametrize(
    ("mutate", "least_incorrect", "least_correct"),
    [
        (drop, 1.0, 0.0),
        (double, 1.0, 0.0),
        (move_to_another_rank, 1.0, 0.0),
        (swap, 0.7, 0.02),
        (swap_neighbors, 0.1, 0.1),
        (move, 0.5, 0.1),
        (move_a_little, 0.2, 0.2),
        (regroup, 0.15, 0.2),
        (rename, 0.25, 0.4),
    ],
)
def test_validator_rejects_exactly_the_incorrect_mutants(
    mutate: Mutation, least_incorrect: float, least_correct: float
) -> None:
    draws = random.Random(mutate.__name__)
    verdicts: Counter[bool] = Counter()
    for schedule in schedules():
        training = is_training(schedule)
        for number in range(MUTANTS_PER_SCHEDULE):
            mutant = mutant_of(schedule, mutate, draws)
            problem = enact(mutant, forward_only=not training, seed=number).problem
            message = refusal(mutant, training)
            assert (message is None) == (problem is None), f"{problem=}, {message=}, {mutant=}"
            assert message is None or message.startswith("rank "), message
            verdicts[problem is None] += 1
    total = verdicts.total()
    assert total == MUTANTS_PER_SCHEDULE * len(schedules())
    assert verdicts[False] >= least_incorrect * total
    assert verdicts[True] >= least_correct * total


def test_validator_checks_the_memory_of_correct_mutants() -> None:
    draws = random.Random(7)
    changed = 0
    for schedule in filter(is_training, schedules()):
        original = enact(schedule).peaks
        share = schedule.num_ranks / schedule.num_stages
        for _ in range(40):
            mutant = mutant_of(schedule, draws.choice([move, move_a_little, regroup]), draws)
            run = enact(mutant)
            if run.problem is None:
                peak = max(run.peaks)
                changed += run.peaks != original
                assert refusal(mutant, True, memory_cap=peak * share) is None
                message = refusal(mutant, True, memory_cap=peak * share - 0.01)
                assert message is not None
                assert message.startswith(f"rank {run.peaks.index(peak)}: keeps {peak * share:.10g} activations")
                assert message.endswith(f"nearest that this schedule fits: {peak * share:.10g}")
    assert changed >= 40
