"""Schedules of dualpipe_interleaved reach their targets."""

import pytest

from dualpipe.generate.dualpipe_interleaved import dualpipe_interleaved
from dualpipe.simulate.bounds import lower_bound
from dualpipe.simulate.costs import Costs, uniform
from dualpipe.simulate.simulate import simulate
from dualpipe.validate import validate


def overhead(num_ranks: int, num_micro_batches: int, costs: Costs, chunks: int) -> float:
    """Returns makespan minus work, after validating the schedule with P + 2 activations."""
    model = uniform(costs, num_ranks, num_ranks * chunks)
    schedule = dualpipe_interleaved(num_ranks, num_micro_batches, model)
    validate(schedule, num_ranks + 2)
    makespan = simulate(schedule, costs).makespan
    assert makespan >= lower_bound(schedule, model, num_ranks + 2).value - 1e-9
    return makespan - num_micro_batches * (costs.forward + costs.backward_input + costs.backward_weight)


def equal_times(exchange: float) -> Costs:
    return Costs(forward=1, backward_input=1, backward_weight=1, exchange=exchange, latency=0)


@pytest.mark.parametrize(("num_ranks", "chunks", "most"), [(8, 2, 1.5), (8, 4, 0.75), (16, 4, 1.75), (6, 3, 5 / 6)])
def test_interleaved_idles_by_its_formula_without_exchange(num_ranks: int, chunks: int, most: float) -> None:
    assert overhead(num_ranks, 4 * num_ranks, equal_times(0), chunks) <= most + 1e-9


@pytest.mark.parametrize(
    ("exchange", "most"), [(0.5, 6.0), (1.0, 12.0), pytest.param(1.5, 30.0, marks=pytest.mark.slow)]
)
def test_interleaved_hides_exchange(exchange: float, most: float) -> None:
    assert overhead(8, 32, equal_times(exchange), 4) <= most


@pytest.mark.slow
def test_interleaved_hides_latency() -> None:
    """Orders that send early at both ends of the step lose 15; with equal preferences in all parts 17.2."""
    costs = Costs(forward=1, backward_input=1, backward_weight=1, exchange=1, latency=0.1)
    assert min(overhead(8, 32, costs, chunks) for chunks in (2, 3)) <= 15
