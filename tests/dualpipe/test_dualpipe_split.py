"""Schedules of dualpipe_split are valid for all sizes and costs, fit memory, and are short enough."""

import random
import time

import pytest

from dualpipe.build import build
from dualpipe.generate.dualpipe import dualpipe
from dualpipe.generate.dualpipe_interleaved import dualpipe_split
from dualpipe.passes import split_backwards
from dualpipe.registry import SCHEDULES
from dualpipe.simulate.bounds import lower_bound
from dualpipe.simulate.costs import CostModel, Costs, StageCosts, uniform
from dualpipe.simulate.simulate import peak_memory, simulate
from dualpipe.validate import validate


def equal_times(exchange: float, latency: float = 0.0) -> Costs:
    return Costs(forward=1, backward_input=1, backward_weight=1, exchange=exchange, latency=latency)


def makespan(num_ranks: int, num_micro_batches: int, costs: Costs) -> float:
    """Returns the makespan for these costs, after validating the schedule with P + 2 activations."""
    schedule = dualpipe_split(num_ranks, num_micro_batches, uniform(costs, num_ranks, num_ranks))
    validate(schedule, num_ranks + (2 if costs.exchange else 1))
    return simulate(schedule, costs).makespan


@pytest.mark.parametrize(
    "num_ranks", [*range(1, 11), *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in range(11, 17))]
)
def test_split_meets_the_lower_bound_for_equal_times_without_exchange(num_ranks: int) -> None:
    counts = {num_ranks, num_ranks + 1, 2 * num_ranks - 1, 2 * num_ranks, 3 * num_ranks + 1, 64, 65}
    for num_micro_batches in counts:
        found = makespan(num_ranks, num_micro_batches, equal_times(0))
        assert found == 3 * num_micro_batches + (num_ranks - 1) // 2


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [7, 8, 15])
def test_split_meets_the_lower_bound_for_hundreds_of_micro_batches(num_ranks: int) -> None:
    for num_micro_batches in (200, 301):
        found = makespan(num_ranks, num_micro_batches, equal_times(0))
        assert found == 3 * num_micro_batches + (num_ranks - 1) // 2


@pytest.mark.slow
@pytest.mark.parametrize(("num_ranks", "overhead"), [(2, 2), (3, 7), (4, 8), (5, 13), (8, 20)])
def test_split_hides_exchange_as_long_as_computation(num_ranks: int, overhead: int) -> None:
    assert makespan(num_ranks, 40, equal_times(1)) - 3 * 40 <= overhead


@pytest.mark.parametrize(("num_ranks", "num_micro_batches", "most"), [(4, 16, 16), (4, 32, 16), (8, 32, 38)])
def test_split_fills_long_exchange_with_weight_gradients(num_ranks: int, num_micro_batches: int, most: int) -> None:
    assert makespan(num_ranks, num_micro_batches, equal_times(1.5)) - 3 * num_micro_batches <= most


@pytest.mark.slow
def test_split_has_no_latency_per_micro_batch() -> None:
    late = equal_times(0, latency=0.1)
    for counts in ((16, 48), (17, 49)):
        overheads = [makespan(8, count, late) - 3 * count for count in counts]
        assert overheads == pytest.approx([overheads[0]] * len(counts), abs=1e-9)


@pytest.mark.slow
def test_split_large_is_made_and_proven_within_seconds() -> None:
    start = time.process_time()
    makespan(16, 512, equal_times(0))
    assert time.process_time() - start < 5


@pytest.mark.slow
@pytest.mark.parametrize(
    "times", [(1, 1.3, 0.7, 0.4, 0), (1, 1.3, 0.7, 0, 0), (2, 3, 1, 0.5, 0.2), (1, 1, 1, 2, 0)], ids=str
)
def test_split_is_the_shortest_of_all_kinds(times: tuple[float, ...]) -> None:
    names = ("forward", "backward_input", "backward_weight", "exchange", "latency")
    costs = Costs(**dict(zip(names, times, strict=True)))
    found = makespan(4, 12, costs)
    assert found <= simulate(split_backwards(dualpipe(4, 12)), costs).makespan + 1e-9
    for kind in ("1f1b", "zb_h1", "zb_v", "dualpipe", "dualpipe_v"):
        other = build(kind, 4, 12, uniform(costs, 4, SCHEDULES.get(kind).num_stages(4)))
        assert found <= simulate(other, costs).makespan + 1e-9


@pytest.mark.slow
def test_split_is_valid_for_uneven_stages_of_any_number() -> None:
    generator = random.Random(5)
    for num_ranks, num_micro_batches in ((1, 2), (2, 1), (3, 7), (5, 3)):
        for zero in (False, True):
            stages = tuple(
                StageCosts(
                    forward=0.0 if zero else generator.uniform(0.5, 2),
                    backward_input=generator.uniform(0.5, 2),
                    backward_weight=0.0 if zero else generator.uniform(0.5, 2),
                    forward_exchange=generator.choice([0.0, 3.0]),
                    backward_exchange=generator.choice([0.0, 1.0]),
                    activation=generator.uniform(0.5, 2),
                )
                for _ in range(num_ranks)
            )
            costs = CostModel(stages=stages, latency=generator.choice([0.0, 0.3]))
            schedule = dualpipe_split(num_ranks, num_micro_batches, costs)
            validate(schedule)
            cap = (num_ranks + 2) * max(stage.activation for stage in stages)
            assert max(peak_memory(schedule, costs)) <= cap + 1e-6
            bound = lower_bound(schedule, costs, cap).value
            assert bound <= simulate(schedule, costs).makespan * (1 + 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("cap", [2, 3])
def test_split_keeps_small_caps_with_a_longer_makespan(cap: int) -> None:
    costs = uniform(equal_times(0), 4, 4)
    schedule = dualpipe_split(4, 9, costs, cap)
    validate(schedule, cap)
    assert simulate(schedule, costs).makespan > 3 * 9 + 1
