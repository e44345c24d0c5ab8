"""Every schedule is at or above the lower bound, known optima reach it, and it gives its reason."""

from random import Random

import pytest

from dualpipe.ir import Group, Op, Operation, Schedule, ScheduleError
from dualpipe.registry import build
from dualpipe.simulate.bounds import lower_bound
from dualpipe.simulate.costs import CostModel, Costs, StageCosts, uniform
from dualpipe.simulate.simulate import simulate
from dualpipe.transfers import made_by, needed_by

COMPUTE = Costs(forward=1, backward_input=1, backward_weight=1, exchange=0, latency=0)
EXCHANGE = Costs(forward=1, backward_input=1, backward_weight=1, exchange=1, latency=0)
HALVES = (Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT)


def shape(num_micro_batches: int, *placement: tuple[int, ...]) -> Schedule:
    num_ranks = 1 + max(placement[0])
    return Schedule(
        kind="any",
        num_ranks=num_ranks,
        num_micro_batches=num_micro_batches,
        placement=placement,
        ranks=((),) * num_ranks,
    )


def bidirectional(num_ranks: int, num_micro_batches: int) -> Schedule:
    row = tuple(range(num_ranks))
    return shape(num_micro_batches, row, row[::-1])


def in_a_v(num_ranks: int, num_micro_batches: int) -> Schedule:
    row = tuple(range(num_ranks))
    return shape(num_micro_batches, row + row[::-1])


def random_costs(random: Random, num_stages: int) -> CostModel:
    def time() -> float:
        return random.choice([0.0, 0.5, 1.0, 1.0, 2.0, random.random()])

    stages = tuple(
        StageCosts(
            forward=time(),
            backward_input=time(),
            backward_weight=time(),
            forward_exchange=time(),
            backward_exchange=time(),
            activation=random.choice([1.0, 1.0, 0.5, 2.0]),
        )
        for _ in range(num_stages)
    )
    return CostModel(stages=stages, latency=time())


def random_schedule(random: Random, empty: Schedule, *, keenness: float, split: float = 0.5) -> Schedule:
    """Draws operations in random order into groups whose inputs earlier groups have made.

    If `keen`, it prefers gradients to forwards and both to weights, like good schedules. `split` is the fraction of
    split backwards.
    """
    left = {
        Operation(kind, direction, stage, micro_batch)
        for direction in range(empty.num_directions)
        for stage in range(empty.num_stages)
        for micro_batch in empty.micro_batches_of(direction)
        for kind in (Op.FORWARD, *(HALVES if random.random() < split else (Op.BACKWARD,)))
    }
    done: set[Operation] = set()
    made: set[object] = {None}
    ranks: list[list[Group]] = [[] for _ in empty.ranks]
    while left:
        ready = sorted(op for op in left if needed_by(op, empty.num_stages) in made and own_needs(op) <= done)
        if random.random() < keenness:
            ready.sort(key=lambda op: (op.kind is Op.BACKWARD_WEIGHT, op.kind is Op.FORWARD, op.micro_batch))
            first = ready[0]
        else:
            first = random.choice(ready)
        rank = empty.rank_of(first.direction, first.stage)
        others = [op for op in ready if op != first and empty.rank_of(op.direction, op.stage) == rank]
        group = (first, *random.sample(others, min(len(others), random.choice([0, 0, 1, 1, 2]))))
        ranks[rank].append(group)
        left -= set(group)
        done |= set(group)
        made |= {made_by(op, empty.num_stages) for op in group}
    return Schedule(
        kind="random",
        num_ranks=empty.num_ranks,
        num_micro_batches=empty.num_micro_batches,
        placement=empty.placement,
        ranks=tuple(map(tuple, ranks)),
    )


def own_needs(op: Operation) -> set[Operation]:
    """Returns the operations of the same stage that must run before."""
    if op.kind is Op.FORWARD:
        return set()
    before = Op.BACKWARD_INPUT if op.kind is Op.BACKWARD_WEIGHT else Op.FORWARD
    return {Operation(before, op.direction, op.stage, op.micro_batch)}


SHAPES = [
    shape(2, (0,)),
    shape(3, (0, 1)),
    shape(4, (0, 1, 2)),
    bidirectional(2, 2),
    bidirectional(2, 5),
    bidirectional(3, 3),
    bidirectional(4, 1),
    in_a_v(2, 3),
    in_a_v(3, 4),
    shape(3, (0, 0, 1, 0)),
]


@pytest.mark.parametrize("empty", SHAPES, ids=lambda empty: f"{empty.placement}x{empty.num_micro_batches}")
def test_bound_holds_for_random_schedules(empty: Schedule) -> None:
    random = Random(3)
    for _ in range(150):
        costs = random_costs(random, empty.num_stages)
        schedule = random_schedule(random, empty, keenness=random.random())
        simulation = simulate(schedule, costs)
        assert lower_bound(schedule, costs).value <= simulation.makespan + 1e-9
        assert lower_bound(schedule, costs, memory_cap=max(simulation.peaks)).value <= simulation.makespan + 1e-9


@pytest.mark.parametrize(
    ("empty", "costs", "optimum"),
    [
        (shape(2, (0,)), COMPUTE, 6.0),
        (shape(1, (0, 1)), COMPUTE, 5.0),
        (shape(2, (0, 1)), COMPUTE, 7.0),
        (bidirectional(2, 2), COMPUTE, 6.0),
        (shape(2, (0,)), EXCHANGE, 6.0),
    ],
)
def test_bound_is_reached_by_the_best_of_many_tiny_schedules(empty: Schedule, costs: Costs, optimum: float) -> None:
    random = Random(5)
    model = uniform(costs, empty.num_ranks, empty.num_stages)
    schedules = (random_schedule(random, empty, keenness=random.random(), split=0.9) for _ in range(800))
    best = min(simulate(schedule, model).makespan for schedule in schedules)
    assert lower_bound(empty, model).value == best == optimum


@pytest.mark.parametrize("costs", [COMPUTE, EXCHANGE, random_costs(Random(7), 8)])
@pytest.mark.parametrize("kind", ["dualpipe", "1f1b"])
def test_bound_holds_for_generated_schedules(kind: str, costs: Costs | CostModel) -> None:
    schedule = build(kind, 8, 16)
    model = uniform(costs, 8, 8) if isinstance(costs, Costs) else costs
    simulation = simulate(schedule, model)
    assert lower_bound(schedule, model, memory_cap=max(simulation.peaks)).value <= simulation.makespan


@pytest.mark.parametrize("num_ranks", range(2, 17))
def test_bound_without_exchange_is_half_the_pipeline(num_ranks: int) -> None:
    for num_micro_batches in range(num_ranks, 3 * num_ranks):
        schedule = bidirectional(num_ranks, num_micro_batches)
        bound = lower_bound(schedule, uniform(COMPUTE, num_ranks, num_ranks))
        assert bound.value == 3 * num_micro_batches + (num_ranks - 1) // 2


@pytest.mark.parametrize("num_ranks", range(4, 17, 2))
def test_bound_with_exchange_under_a_cap_is_twice_the_pipeline_less_three(num_ranks: int) -> None:
    for num_micro_batches in (2 * num_ranks, 64):
        schedule = bidirectional(num_ranks, num_micro_batches)
        model = uniform(EXCHANGE, num_ranks, num_ranks)
        bound = lower_bound(schedule, model, memory_cap=num_ranks + 1)
        assert bound.value == 3 * num_micro_batches + 2 * num_ranks - 3
        assert f"rank {num_ranks // 2 - 1}" in bound.reason or f"rank {num_ranks // 2}" in bound.reason
        assert f"with a cap of {num_ranks + 1}" in bound.reason
        assert lower_bound(schedule, model).value == 3 * num_micro_batches + num_ranks - 2


def test_bound_of_one_micro_batch_is_its_critical_path_with_links() -> None:
    costs = Costs(forward=1, backward_input=2, backward_weight=0.5, exchange=0.25, latency=0.1)
    bound = lower_bound(shape(1, (0, 1, 2)), uniform(costs, 3, 3))
    assert bound.value == pytest.approx(3 * 1.25 + 3 * 2.25 + 4 * 0.1 + 0.5)
    assert "the time of one micro-batch" in bound.reason


def test_bound_counts_no_link_between_stages_of_one_rank() -> None:
    costs = Costs(forward=2, backward_input=2, backward_weight=2, exchange=0, latency=0.5)
    bound = lower_bound(in_a_v(2, 1), uniform(costs, 2, 4))
    assert bound.value == pytest.approx(4 + 4 + 1 + 4 * 0.5)


def test_bound_under_a_tight_cap_counts_memory_and_time() -> None:
    schedule = shape(20, (0, 1, 2, 3))
    bound = lower_bound(schedule, uniform(COMPUTE, 4, 4), memory_cap=1)
    # One at a time on rank 0: each activation is alive during F of 4 stages, I of 4 stages and its W.
    assert bound.value == 20 * 9
    assert "memory x time" in bound.reason


def test_bound_never_grows_with_the_cap() -> None:
    schedule = bidirectional(6, 18)
    model = uniform(EXCHANGE, 6, 6)
    values = [lower_bound(schedule, model, memory_cap=cap).value for cap in (1, 2, 3, 4, 5.5, 7, 9, 18, 50)]
    assert values == sorted(values, reverse=True)
    assert values[0] > values[-1] == lower_bound(schedule, model).value


def test_bound_counts_the_backward_path_if_weights_cost_nothing() -> None:
    costs = Costs(forward=1, backward_input=1, backward_weight=0, exchange=0, latency=0)
    bound = lower_bound(shape(10, (0, 1, 2, 3)), uniform(costs, 4, 4))
    assert bound.value == 3 + 20 + 0 + 3
    assert "the last gradient needs 3 to reach stage 0" in bound.reason


def test_bound_rejects_a_cap_below_one_activation() -> None:
    with pytest.raises(ScheduleError, match=r"memory_cap.*keeps 1 .* cap of 0\.5 .*nearest: 1"):
        lower_bound(shape(4, (0, 1)), uniform(COMPUTE, 2, 2), memory_cap=0.5)
