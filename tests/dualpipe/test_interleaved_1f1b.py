"""Interleaved 1F1B is valid for any size, reaches known overheads and keeps memory caps."""

import time

import pytest

from dualpipe.build import build
from dualpipe.simulate.costs import CostModel, Costs, StageCosts, uniform
from dualpipe.simulate.simulate import simulate
from dualpipe.validate import validate


def costs_of(exchange: float, latency: float = 0.0, backward_input: float = 1.0) -> Costs:
    return Costs(
        forward=1.0,
        backward_input=backward_input,
        backward_weight=2.0 - backward_input,
        exchange=exchange,
        latency=latency,
    )


def overhead(num_ranks: int, num_micro_batches: int, model: CostModel, memory_cap: float | None = None) -> float:
    schedule = build("interleaved_1f1b", num_ranks, num_micro_batches, model, memory_cap)
    validate(schedule, memory_cap)
    work = [stage.forward + stage.backward_input + stage.backward_weight for stage in model.stages]
    return simulate(schedule, model).makespan - num_micro_batches * sum(work) / num_ranks


@pytest.mark.parametrize("chunks", [1, 2, 4])
@pytest.mark.parametrize(("num_ranks", "num_micro_batches"), [(4, 8), (4, 9), (5, 13), (8, 30), (16, 39)])
def test_interleaved_1f1b_without_exchange_idles_only_until_the_first_forward_arrives(
    chunks: int, num_ranks: int, num_micro_batches: int
) -> None:
    """The last rank waits (P-1)F/v. Micro-batches need not be a multiple of the ranks."""
    model = uniform(costs_of(0.0), num_ranks, num_ranks * chunks)
    assert overhead(num_ranks, num_micro_batches, model) == pytest.approx((num_ranks - 1) / chunks)


@pytest.mark.parametrize(
    ("chunks", "costs", "most"),
    [
        (2, costs_of(0.5), 11.75),
        pytest.param(4, costs_of(0.5), 8.0, marks=pytest.mark.long),
        pytest.param(2, costs_of(1.0), 13.0, marks=pytest.mark.long),
        pytest.param(4, costs_of(1.0), 10.5, marks=pytest.mark.long),
        (4, costs_of(1.5), 23.75),
        pytest.param(2, costs_of(1.0, backward_input=1.3), 19.55, marks=pytest.mark.long),
        pytest.param(4, costs_of(1.0, backward_input=1.3), 16.3, marks=pytest.mark.long),
        (4, costs_of(1.0, latency=0.1), 20.4),
    ],
)
def test_interleaved_1f1b_8_ranks_32_micro_batches_is_at_most_that_long(chunks: int, costs: Costs, most: float) -> None:
    assert overhead(8, 32, uniform(costs, 8, 8 * chunks)) <= most + 1e-9


@pytest.mark.parametrize("cap", [1.0, 1.5, 3.0, 5.0])
def test_interleaved_1f1b_keeps_any_cap_of_one_micro_batch_or_more(cap: float) -> None:
    for exchange in (0.0, 1.0):
        overhead(4, 10, uniform(costs_of(exchange), 4, 8), cap)


def test_interleaved_1f1b_orders_stages_of_unequal_costs() -> None:
    stages = tuple(
        StageCosts(
            forward=1 + index % 3 / 4,
            backward_input=1.0,
            backward_weight=0.5 + index % 2,
            forward_exchange=0.5,
            backward_exchange=0.7,
            activation=1 + index / 8,
        )
        for index in range(8)
    )
    model = CostModel(stages=stages, latency=0.1)
    for cap in (None, 4.0, 6.0):
        schedule = build("interleaved_1f1b", 4, 11, model, cap)
        validate(schedule)
        assert cap is None or max(simulate(schedule, model).peaks) <= cap + 1e-9


def test_interleaved_1f1b_of_large_sizes_is_made_within_seconds() -> None:
    # A bound on the order of growth: it takes about one second, quadratic work would take minutes.
    start = time.process_time()
    build("interleaved_1f1b", 16, 120, uniform(costs_of(1.0), 16, 64))
    assert time.process_time() - start < 8
