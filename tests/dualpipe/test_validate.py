"""The validator detects every mutation of a valid schedule, and an independent proof agrees with it."""

import random
import time
from dataclasses import replace

import pytest

from dualpipe.build import build
from dualpipe.generate.dualpipe import dualpipe, dualpipe_v
from dualpipe.generate.one_f_one_b import one_f_one_b
from dualpipe.generate.zero_bubble import zb_h1
from dualpipe.ir import Group, Op, Operation, Schedule, ScheduleError
from dualpipe.passes import forward_only
from dualpipe.simulate.costs import Costs
from dualpipe.simulate.simulate import simulate
from dualpipe.validate import validate
from tests.dualpipe.test_mutations import Lists, Mutation, mutant_of, somewhere

SIZES: list[tuple[str, int, int]] = [
    ("dualpipe", 2, 4),
    ("dualpipe", 4, 8),
    ("dualpipe", 6, 14),
    ("1f1b", 2, 3),
    ("1f1b", 4, 6),
]


def swap_within_a_flow(lists: Lists, generator: random.Random) -> None:
    """Swaps two operations of one kind on the same link; the other end is unchanged."""
    while True:
        rank, *first = somewhere(lists, generator)
        other, *second = somewhere(lists, generator)
        one, two = lists[rank][first[0]][first[1]], lists[other][second[0]][second[1]]
        same = (one.kind, one.direction, one.stage) == (two.kind, two.direction, two.stage)
        if rank == other and one != two and same and one.kind is not Op.BACKWARD_WEIGHT:
            lists[rank][first[0]][first[1]], lists[rank][second[0]][second[1]] = two, one
            return


def swap_dependent(lists: Lists, generator: random.Random) -> None:
    """Swaps a micro-batch's forward and one of its backwards in the same stage."""
    while True:
        rank, *first = somewhere(lists, generator)
        other, *second = somewhere(lists, generator)
        one, two = lists[rank][first[0]][first[1]], lists[other][second[0]][second[1]]
        if rank == other and one.kind is Op.FORWARD and two == one.with_kind(two.kind) and one != two:
            lists[rank][first[0]][first[1]], lists[rank][second[0]][second[1]] = two, one
            return


def change_kind(lists: Lists, generator: random.Random) -> None:
    rank, group, member = somewhere(lists, generator)
    operation = lists[rank][group][member]
    kind = generator.choice([kind for kind in Op if kind is not operation.kind])
    lists[rank][group][member] = operation.with_kind(kind)


def put_out_of_range(lists: Lists, generator: random.Random) -> None:
    rank, group, member = somewhere(lists, generator)
    operation = lists[rank][group][member]
    field = generator.choice(["direction", "stage", "micro_batch"])
    lists[rank][group][member] = operation._replace(**{field: generator.choice([-1, 99])})


@pytest.mark.parametrize("mutate", [swap_within_a_flow, swap_dependent, change_kind, put_out_of_range])
@pytest.mark.parametrize("size", SIZES)
def test_validator_detects_every_mutation(size: tuple[str, int, int], mutate: Mutation) -> None:
    schedule = build(*size)
    validate(schedule)
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


def test_validator_rejects_dependent_members_of_a_group() -> None:
    together = (Operation(F, 0, 0, 0), Operation(B, 0, 0, 0))
    schedule = Schedule(kind="any", num_ranks=1, num_micro_batches=1, placement=((0,),), ranks=((together,),))
    with pytest.raises(ScheduleError, match=r"^rank 0: group 0 has B0\.0 together with F0\.0, which it needs$"):
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
    schedule = zb_h1(3, 6)
    weights_last = tuple(sorted(schedule.ranks[2], key=lambda group: group[0].kind is W))
    schedule = replace(schedule, ranks=(*schedule.ranks[:2], weights_last))
    with pytest.raises(ScheduleError, match=r"^rank 2: keeps 6 activations .* nearest that this schedule fits: 6$"):
        validate(schedule, memory_cap=2)


def test_validator_distinguishes_training_from_forward_only() -> None:
    schedule = build("dualpipe", 4, 8)
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
        validate(replace(build("dualpipe", 2, 4), **changes))  # type: ignore[arg-type]


@pytest.mark.slow
def test_validate_and_simulate_take_seconds_for_a_large_schedule() -> None:
    """196,608 operations take about 1 s each on one core; the limits leave room for a busy machine."""
    schedule = build("zb_v", 32, 1024)
    started = time.process_time()
    validate(schedule)
    validated = time.process_time()
    simulate(schedule, Costs(forward=1, backward_input=1, backward_weight=1, exchange=1, latency=0))
    assert validated - started < 3
    assert time.process_time() - validated < 3
