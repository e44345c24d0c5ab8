"""Every schedule is at or above the lower bound, known optima reach it, and it gives its reason."""

from itertools import combinations
from random import Random

import pytest

from dualpipe.bounds import lower_bound
from dualpipe.costs import CostModel, Costs, uniform
from dualpipe.ir import Op, Operation, Schedule, ScheduleError, made_by, needed_by
from dualpipe.simulation import simulate
from tests.dualpipe.random_schedules import random_costs, random_schedule

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


def own_needs(op: Operation) -> set[Operation]:
    """Returns the operations of the same stage that must run before."""
    if op.kind is Op.FORWARD:
        return set()
    before = Op.BACKWARD_INPUT if op.kind is Op.BACKWARD_WEIGHT else Op.FORWARD
    return {Operation(before, op.direction, op.stage, op.micro_batch)}


SHAPES = [
    shape(4, (0, 1, 2)),
    bidirectional(3, 3),
    bidirectional(4, 1),
    in_a_v(2, 3),
    shape(3, (0, 0, 1, 0)),
    shape(4, (0, 1, 0, 1), (1, 0, 1, 0)),
]


@pytest.mark.slow
@pytest.mark.parametrize("empty", SHAPES, ids=lambda empty: f"{empty.placement}x{empty.num_micro_batches}")
def test_bound_holds_for_random_schedules(empty: Schedule) -> None:
    for seed in range(15):
        costs = random_costs(Random(seed), empty.num_stages).without_offload()
        schedule = random_schedule(empty.placement, empty.num_micro_batches, seed)
        simulation = simulate(schedule, costs)
        assert lower_bound(schedule, costs).value <= simulation.makespan + 1e-9
        assert lower_bound(schedule, costs, memory_cap=max(simulation.peaks)).value <= simulation.makespan + 1e-9


class Exhaustive:
    """Exhaustive search over all orders and groups of a small schedule for the shortest makespan."""

    def __init__(self, empty: Schedule, costs: CostModel, memory_cap: float) -> None:
        """Searches; `shortest` is the result."""
        self.empty = empty
        self.costs = costs
        self.cap = memory_cap
        self.shortest = float("inf")
        operations = [
            Operation(kind, direction, stage, micro_batch)
            for direction in range(empty.num_directions)
            for stage in range(empty.num_stages)
            for micro_batch in empty.micro_batches_of(direction)
            for kind in (Op.FORWARD, *HALVES)
        ]
        self._ranks = [
            [op for op in operations if empty.rank_of(op.direction, op.stage) == rank]
            for rank in range(empty.num_ranks)
        ]
        self._makers = {made_by(op, empty.num_stages): op for op in operations}
        self._extend({}, (0.0,) * empty.num_ranks, (0.0,) * empty.num_ranks, 0.0)

    def _extend(
        self, ends: dict[Operation, float], free: tuple[float, ...], alive: tuple[float, ...], begun: float
    ) -> None:
        left = [[op for op in rank if op not in ends] for rank in self._ranks]
        least = (time + sum(map(self.costs.compute_of, ops)) for time, ops in zip(free, left, strict=True))
        if max(least) >= self.shortest:
            return
        if not any(left):
            self.shortest = max(free)
        for rank, ops in enumerate(left):
            ready = [op for op in ops if self._is_ready(op, ends)]
            for group in (group for size in (1, 2, 3) for group in combinations(ready, size)):
                start = max(free[rank], *(self._arrival(op, ends) for op in group))
                made = sum(self.costs.stages[op.stage].activation for op in group if op.kind is Op.FORWARD)
                # Groups are added in the order of their starts, so that each schedule is seen once.
                if start >= begun and alive[rank] + made <= self.cap:
                    freed = sum(self.costs.stages[op.stage].activation for op in group if op.kind is Op.BACKWARD_WEIGHT)
                    end = start + self.costs.duration_of(group)
                    self._extend(
                        ends | dict.fromkeys(group, end),
                        (*free[:rank], end, *free[rank + 1 :]),
                        (*alive[:rank], alive[rank] + made - freed, *alive[rank + 1 :]),
                        start,
                    )

    def _is_ready(self, op: Operation, ends: dict[Operation, float]) -> bool:
        needed = needed_by(op, self.empty.num_stages)
        return own_needs(op) <= ends.keys() and (needed is None or self._makers[needed] in ends)

    def _arrival(self, op: Operation, ends: dict[Operation, float]) -> float:
        needed = needed_by(op, self.empty.num_stages)
        own = max((ends[each] for each in own_needs(op)), default=0.0)
        if needed is None:
            return own
        maker = self._makers[needed]
        is_sent = self.empty.rank_of(op.direction, op.stage) != self.empty.rank_of(maker.direction, maker.stage)
        return max(own, ends[maker] + (self.costs.latency if is_sent else 0.0))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("empty", "exchange", "latency", "cap", "optimum"),
    [
        (shape(2, (0,)), 1, 0, 2, 6),
        (shape(1, (0, 1)), 0, 0, 2, 5),
        (bidirectional(2, 2), 0, 0, 2, 6),
        (shape(2, (0, 1)), 1, 0, 2, 10),
        (shape(2, (0, 1)), 1, 0.5, 1, 20),
        (shape(3, (0, 1)), 0, 0.5, 2, 12),
        (shape(1, (0, 1, 2)), 1, 0, 1, 13),
        (shape(2, (0, 1, 2)), 0, 0, 2, 9),
        (bidirectional(2, 2), 1.5, 0.5, 2, 12),
        (bidirectional(2, 3), 1, 0, 3, 11),
    ],
)
def test_bound_is_the_makespan_of_the_shortest_of_all_schedules(
    empty: Schedule, exchange: float, latency: float, cap: float, optimum: float
) -> None:
    costs = Costs(forward=1, backward_input=1, backward_weight=1, exchange=exchange, latency=latency)
    model = uniform(costs, empty.num_ranks, empty.num_stages)
    bound = lower_bound(empty, model, memory_cap=cap)
    assert bound.value == Exhaustive(empty, model, cap).shortest == optimum


@pytest.mark.parametrize("empty", [shape(2, (0,)), shape(1, (0, 1, 2)), shape(2, (0, 1)), bidirectional(2, 2)])
def test_bound_is_at_most_the_shortest_makespan_for_unequal_costs(empty: Schedule) -> None:
    for seed in range(4):
        costs = random_costs(Random(seed), empty.num_stages).without_offload()
        cap = 2 * sum(stage.activation for stage in costs.stages)
        assert lower_bound(empty, costs, memory_cap=cap).value <= Exhaustive(empty, costs, cap).shortest + 1e-9


@pytest.mark.parametrize("num_ranks", [2, 3, 8, 15])
def test_bound_without_exchange_is_half_the_pipeline(num_ranks: int) -> None:
    for num_micro_batches in range(num_ranks, 3 * num_ranks):
        schedule = bidirectional(num_ranks, num_micro_batches)
        bound = lower_bound(schedule, uniform(COMPUTE, num_ranks, num_ranks))
        assert bound.value == 3 * num_micro_batches + (num_ranks - 1) // 2


@pytest.mark.parametrize("num_ranks", [4, 10])
def test_bound_with_exchange_under_a_cap_is_three_pipelines_less_five(num_ranks: int) -> None:
    for num_micro_batches in (2 * num_ranks, 64):
        schedule = bidirectional(num_ranks, num_micro_batches)
        model = uniform(EXCHANGE, num_ranks, num_ranks)
        bound = lower_bound(schedule, model, memory_cap=num_ranks + 1)
        # 2P - 3 before gradients, P - 2 after forwards.
        assert bound.value == 3 * num_micro_batches + 3 * num_ranks - 5
        assert f"rank {num_ranks // 2 - 1}" in bound.reason or f"rank {num_ranks // 2}" in bound.reason
        assert f"it loses {2 * num_ranks - 3} before gradients" in bound.reason
        assert f"it loses {num_ranks - 2} after forwards" in bound.reason
        assert f"with a cap of {num_ranks + 1}" in bound.reason
        assert lower_bound(schedule, model).value == 3 * num_micro_batches + num_ranks - 2


@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_bound_of_several_chunks_without_exchange_is_a_fraction_of_half_the_pipeline(chunks: int) -> None:
    for num_ranks in (4, 8):
        row = tuple(range(num_ranks)) * chunks
        bound = lower_bound(shape(64, row, row[::-1]), uniform(COMPUTE, num_ranks, num_ranks * chunks))
        assert bound.value == 192 + (num_ranks // 2 - 1) / chunks
        assert "before the first forward can reach it" in bound.reason


def test_bound_of_several_chunks_counts_the_path_of_the_first_micro_batch() -> None:
    # With 4 chunks the first gradient is back at rank 3 after 32 F and 3 I of 1/2 each, while 10 forwards fit.
    row = tuple(range(8)) * 4
    bound = lower_bound(shape(32, row, row[::-1]), uniform(EXCHANGE, 8, 32), memory_cap=10)
    assert bound.value == 96 + 17.5 - 10
    assert "its first 17.5 have room for 10 with a cap of 10" in bound.reason


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
    assert "it loses 3 after gradients" in bound.reason


def test_bound_rejects_a_cap_below_one_activation() -> None:
    with pytest.raises(ScheduleError, match=r"memory_cap.*keeps 1 .* cap of 0\.5 .*nearest: 1"):
        lower_bound(shape(4, (0, 1)), uniform(COMPUTE, 2, 2), memory_cap=0.5)
