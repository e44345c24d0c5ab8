"""The search returns valid schedules within the cap, and a larger cap never gives a longer one."""

import pytest

from dualpipe.generate.dualpipe_interleaved import dualpipe_interleaved, empty
from dualpipe.generate.search import in_sequence
from dualpipe.ir import MemoryCapError
from dualpipe.simulate.costs import Costs, uniform
from dualpipe.simulate.simulate import simulate
from dualpipe.validate import validate

COSTS = Costs(forward=1, backward_input=1.3, backward_weight=0.7, exchange=0.9, latency=0.05)


@pytest.mark.parametrize("chunks", [1, 2])
def test_search_with_a_larger_cap_is_never_longer(chunks: int) -> None:
    costs = uniform(COSTS, 4, 4 * chunks)
    before = float("inf")
    for cap in (1, 1.5, 2, 2.7, 3, 4, 4.5, 5, 6, 7, 9, 40):
        schedule = dualpipe_interleaved(4, 13, costs, cap)
        validate(schedule, cap)
        makespan = simulate(schedule, costs).makespan
        assert makespan <= before + 1e-9, f"a cap of {cap} gives {makespan}, a smaller one {before}"
        before = makespan


def test_search_extends_a_steady_state_to_many_micro_batches() -> None:
    costs = uniform(COSTS, 4, 8)
    many = dualpipe_interleaved(4, 400, costs)
    validate(many, 6)
    few = simulate(dualpipe_interleaved(4, 32, costs), costs).makespan - 3 * 32
    assert simulate(many, costs).makespan - 3 * 400 <= 2 * few


@pytest.mark.parametrize("num_ranks", [1, 2, 5])
def test_in_sequence_keeps_one_micro_batch(num_ranks: int) -> None:
    validate(in_sequence(empty(num_ranks, 7, 2)), 1)


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_least_memory_is_one_activation(num_ranks: int, chunks: int) -> None:
    """When the last stage runs F, all stages hold the micro-batch, so no schedule keeps less than one."""
    costs = uniform(COSTS, num_ranks, num_ranks * chunks)
    schedule = dualpipe_interleaved(num_ranks, 5, costs, 1)
    validate(schedule, 1)
    with pytest.raises(MemoryCapError) as refused:
        dualpipe_interleaved(num_ranks, 5, costs, 0.99)
    assert refused.value.least == 1


def test_one_rank_runs_one_micro_batch_at_a_time_without_waiting() -> None:
    costs = uniform(COSTS, 1, 1)
    schedule = dualpipe_interleaved(1, 6, costs, 1)
    assert max(simulate(schedule, costs).peaks) == 1
    assert simulate(schedule, costs).idle == (0.0,)


def test_in_sequence_sends_gradients_before_weight_gradients() -> None:
    """A step of 4 ranks is a third shorter than if each micro-batch waited for every W of the one before it."""
    costs = uniform(Costs(forward=1, backward_input=1, backward_weight=1, exchange=0, latency=0), 4, 4)
    assert simulate(in_sequence(empty(4, 8, 1)), costs).makespan == 51
