"""Lockstep orders are valid for every size, and reach the lower bound with W in idle time."""

import pytest

from dualpipe.generate.dualpipe_interleaved import empty, known_orders
from dualpipe.generate.lockstep import lockstep
from dualpipe.optimize.weights import place_weights
from dualpipe.simulate.costs import Costs, uniform
from dualpipe.simulate.simulate import peak_activations, simulate
from dualpipe.validate import validate

UNIT = Costs(forward=1, backward_input=1, backward_weight=1, exchange=0, latency=0)
EXCHANGING = Costs(forward=1, backward_input=1, backward_weight=1, exchange=1, latency=0)


@pytest.mark.parametrize(
    "num_ranks", [*range(1, 7), *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (7, 8, 9))]
)
def test_lockstep_orders_are_valid_within_one_activation_more_than_ranks(num_ranks: int) -> None:
    costs = uniform(EXCHANGING, num_ranks, num_ranks)
    for num_micro_batches in (*range(1, num_ranks + 1), 2 * num_ranks, 3 * num_ranks + 1):
        shape = empty(num_ranks, num_micro_batches)
        orders = [lockstep(shape, paired=True), lockstep(shape, paired=False)]
        orders += known_orders(shape, costs, num_ranks + 1)
        assert len(orders) >= 4
        for order in orders:
            validate(order, num_ranks + 1)


@pytest.mark.parametrize("num_ranks", range(1, 17))
def test_lockstep_with_placed_weights_meets_the_lower_bound(num_ranks: int) -> None:
    costs = uniform(UNIT, num_ranks, num_ranks)
    for num_micro_batches in (*range(num_ranks, 3 * num_ranks + 2, max(num_ranks // 3, 1)), 33):
        if num_micro_batches < num_ranks:
            continue
        order = lockstep(empty(num_ranks, num_micro_batches), paired=False)
        placed = place_weights(order, costs, num_ranks + 1)
        assert placed is not None
        assert simulate(placed, costs).makespan == 3 * num_micro_batches + (num_ranks - 1) // 2
        assert max(peak_activations(placed)) <= num_ranks + 1


@pytest.mark.parametrize("num_ranks", range(2, 10))
def test_lockstep_pairs_grow_only_by_work(num_ranks: int) -> None:
    costs = uniform(EXCHANGING, num_ranks, num_ranks)

    def overhead(num_micro_batches: int) -> float:
        order = lockstep(empty(num_ranks, num_micro_batches), paired=True)
        return simulate(order, costs).makespan - 3 * num_micro_batches

    assert overhead(4 * num_ranks) == overhead(2 * num_ranks + 2 * (num_ranks % 2))
    assert overhead(8 * num_ranks + 1) == overhead(4 * num_ranks + 1)


@pytest.mark.parametrize("chunks", [2, 3, 4])
@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_lockstep_with_chunks_shortens_the_ends(num_ranks: int, chunks: int) -> None:
    costs = uniform(UNIT, num_ranks, num_ranks * chunks)
    for num_micro_batches in (2 * num_ranks, 3 * num_ranks + 1):
        order = lockstep(empty(num_ranks, num_micro_batches, chunks), paired=False)
        placed = place_weights(order, costs, num_ranks + 1)
        assert placed is not None
        validate(placed, num_ranks + 1)
        assert simulate(placed, costs).makespan <= 3 * num_micro_batches + (num_ranks - 1) / 2 / chunks + 1e-9
