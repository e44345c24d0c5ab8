"""The validator rejects exactly the mutations of valid schedules that compute wrong results."""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest

from dualpipe.builder import build_schedule
from dualpipe.generate.dualpipe import dualpipe, dualpipe_v, mirror
from dualpipe.generate.one_f_one_b import one_f_one_b
from dualpipe.generate.zb1p import zb1p
from dualpipe.generate.zero_bubble import zb_v
from dualpipe.ir import Group, Op, Operation, Schedule, ScheduleError
from dualpipe.passes import forward_only
from dualpipe.validate import validate
from tests.dualpipe.enactment import enact
from tests.dualpipe.random_schedules import bidirectional, looped, offloaded, random_schedule, v_shaped

Lists = list[list[list[Operation]]]
Mutation = Callable[[Lists, random.Random], None]
MUTANTS_PER_SCHEDULE = 10


@cache
def schedules() -> tuple[Schedule, ...]:
    """Yields schedules of all kinds, sizes and groups, including three forward-only ones."""
    published = [
        *(one_f_one_b(*size) for size in ((1, 2), (2, 3), (4, 6))),
        *(zb1p(*size) for size in ((2, 2), (3, 5), (4, 8))),
        *(zb_v(*size) for size in ((1, 3), (2, 3), (3, 7), (4, 4))),
        *(dualpipe(*size) for size in ((2, 4), (4, 8), (6, 14))),
        *(dualpipe_v(*size) for size in ((1, 2), (2, 5), (3, 7))),
        build_schedule("dualpipe_split", 3, 5),
        build_schedule("dualpipe_split", 5, 7),
        mirror(zb_v(2, 3)),
        mirror(zb_v(3, 4)),
    ]
    drawn = [
        random_schedule(bidirectional(3), 5, seed=0),
        random_schedule(bidirectional(5), 4, seed=1),
        random_schedule(v_shaped(3), 3, seed=2),
        random_schedule(looped(2, 3), 3, seed=3),
        random_schedule(((0, 0, 1, 0), (1, 2, 2, 0)), 5, seed=4),
        *(random_schedule(bidirectional(3), 8, seed=depth, link_depth=depth) for depth in (2, 3, 4)),
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


@pytest.mark.slow
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


def change_kind(lists: Lists, generator: random.Random) -> None:
    rank, group, member = somewhere(lists, generator)
    operation = lists[rank][group][member]
    kind = generator.choice([kind for kind in Op if kind is not operation.kind])
    lists[rank][group][member] = operation.with_kind(kind)


def put_out_of_range(lists: Lists, generator: random.Random) -> None:
    rank, group, member = somewhere(lists, generator)
    operation = lists[rank][group][member]
    field = generator.choice(["direction", "stage", "micro_batch"])
    lists[rank][group][member] = operation._replace(**{field: generator.choice([-1, 99])})  # type: ignore[arg-type]


@pytest.mark.parametrize("mutate", [change_kind, put_out_of_range])
def test_validator_detects_operations_of_another_kind_and_out_of_range(mutate: Mutation) -> None:
    schedule = build_schedule("dualpipe", 4, 8)
    generator = random.Random(0)
    for _ in range(40):
        with pytest.raises(ScheduleError, match=r"^rank \d+: "):
            validate(mutant_of(schedule, mutate, generator))


def alone(*operations: tuple[Op, int, int, int]) -> tuple[Group, ...]:
    return tuple((Operation(*fields),) for fields in operations)


F, B, I, W = Op.FORWARD, Op.BACKWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT  # noqa: E741


def test_validator_finds_unequal_orders_on_a_link() -> None:
    # Operations of one group post their receives together, so there is no deadlock: the tensors would be swapped.
    schedule = Schedule(
        kind="any",
        num_ranks=2,
        num_micro_batches=2,
        placement=((0, 1),),
        ranks=(alone((F, 0, 0, 0), (F, 0, 0, 1)), ((Operation(F, 0, 1, 1), Operation(F, 0, 1, 0)),)),
    )
    expected = (
        r"^rank 1: expects activation 0\.1 as number 0 of the activations from rank 0, which sends activation 0\.0$"
    )
    with pytest.raises(ScheduleError, match=expected):
        validate(schedule, forward_only=True)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({W: None}, "rank 0: stage 0, micro-batch 0 has I but no W"),
        ({I: None}, "rank 0: stage 0, micro-batch 0 has W but no I"),
        ({F: None}, "rank 0: stage 0, micro-batch 0 has no F"),
        ({I: None, W: None}, "rank 0: stage 0, micro-batch 0 has F but no backward"),
        ({I: B}, "rank 0: stage 0, micro-batch 0 has B and also W"),
    ],
)
def test_validator_names_missing_operations_of_a_micro_batch(change: dict[Op, Op | None], problem: str) -> None:
    kinds = [change.get(kind, kind) for kind in (F, I, W)]
    groups = alone(*((kind, 0, 0, 0) for kind in kinds if kind is not None))
    schedule = Schedule(kind="any", num_ranks=1, num_micro_batches=1, placement=((0,),), ranks=(groups,))
    with pytest.raises(ScheduleError, match=f"^{problem}$"):
        validate(schedule)


def test_validator_orders_stages_within_a_rank() -> None:
    def v_shape(*operations: tuple[Op, int, int, int]) -> Schedule:
        return Schedule(kind="any", num_ranks=1, num_micro_batches=1, placement=((0, 0),), ranks=(alone(*operations),))

    validate(v_shape((F, 0, 0, 0), (F, 0, 1, 0), (I, 0, 1, 0), (B, 0, 0, 0), (W, 0, 1, 0)))
    with pytest.raises(ScheduleError, match=r"^rank 0: group 0 has F1\.0 before F0\.0, which it needs$"):
        validate(v_shape((F, 0, 1, 0), (F, 0, 0, 0), (I, 0, 1, 0), (B, 0, 0, 0), (W, 0, 1, 0)))
    with pytest.raises(ScheduleError, match=r"^rank 0: group 2 has B0\.0 before I1\.0, which it needs$"):
        validate(v_shape((F, 0, 0, 0), (F, 0, 1, 0), (B, 0, 0, 0), (I, 0, 1, 0), (W, 0, 1, 0)))


@pytest.mark.parametrize(
    ("schedule", "fits", "too_little", "problem"),
    [
        (dualpipe(4, 8), 5, 4, "rank 0: keeps 5 activations of model/P at once, the memory cap is 4; nearest .*: 5"),
        (dualpipe_v(3, 7), 3.5, 3.25, "rank 0: keeps 3.5 activations .*, the memory cap is 3.25; nearest .*: 3.5"),
        (one_f_one_b(3, 6), 3, 2.5, "rank 0: keeps 3 activations .*, the memory cap is 2.5; nearest .*: 3"),
    ],
)
def test_validator_keeps_the_memory_cap(schedule: Schedule, fits: float, too_little: float, problem: str) -> None:
    validate(schedule, memory_cap=fits)
    with pytest.raises(ScheduleError, match=f"^{problem}$"):
        validate(schedule, memory_cap=too_little)


def test_validator_names_the_rank_that_keeps_most() -> None:
    schedule = zb1p(3, 6)
    weights_last = tuple(sorted(schedule.ranks[2], key=lambda group: group[0].kind is W))
    schedule = replace(schedule, ranks=(*schedule.ranks[:2], weights_last))
    with pytest.raises(ScheduleError, match=r"^rank 2: keeps 6 activations .* nearest that this schedule fits: 6$"):
        validate(schedule, memory_cap=2)


def test_validator_distinguishes_training_from_forward_only() -> None:
    schedule = build_schedule("dualpipe", 4, 8)
    with pytest.raises(ScheduleError, match="has F but no backward"):
        validate(forward_only(schedule))
    with pytest.raises(ScheduleError, match="has a backward in a forward-only schedule"):
        validate(schedule, forward_only=True)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"placement": ((0, 2), (1, 0))}, r"placement\[0\]\[1\]: must be a rank below 2, is 2"),
        ({"placement": ((0, 1), (1,))}, r"placement\[1\]: must have as many stages"),
        ({"placement": ()}, "placement: places no stage"),
        ({"num_ranks": 3}, "ranks: must have num_ranks = 3 entries, has 2"),
        ({"num_micro_batches": 0}, "needs at least 1 rank and 1 micro-batch"),
        ({"ranks": (((),), ())}, "rank 0: group 0 is empty"),
    ],
)
def test_validator_rejects_contradictory_sizes(changes: dict[str, object], problem: str) -> None:
    with pytest.raises(ScheduleError, match=problem):
        validate(replace(build_schedule("dualpipe", 2, 4), **changes))  # type: ignore[arg-type]
