"""Interleaved, sliced and split schedules: valid for all sizes, within memory, and short enough."""

import random
from dataclasses import asdict, replace
from itertools import product

import pytest

from dualpipe.bounds import lower_bound
from dualpipe.builder import build_schedule
from dualpipe.costs import CostModel, Costs, StageCosts, uniform
from dualpipe.generate.dualpipe_interleaved import dualpipe_interleaved
from dualpipe.ir import Op, Operation, Schedule, ScheduleError, from_json, to_json
from dualpipe.passes import forward_only, split_backwards
from dualpipe.registry import check_slices
from dualpipe.simulation import peak_activations, peak_memory, simulate
from dualpipe.validate import validate, validate_passes
from tests.covering import exhaustive
from tests.dualpipe.event_clock import EventClock


def costs_of(exchange: float, latency: float = 0.0, backward_input: float = 1.0) -> Costs:
    return Costs(
        forward=1.0,
        backward_input=backward_input,
        backward_weight=2.0 - backward_input,
        exchange=exchange,
        latency=latency,
    )


def overhead(num_ranks: int, num_micro_batches: int, model: CostModel, memory_cap: float | None = None) -> float:
    schedule = build_schedule("interleaved_1f1b", num_ranks, num_micro_batches, model, memory_cap)
    validate(schedule, memory_cap)
    work = [stage.forward + stage.backward_input + stage.backward_weight for stage in model.stages]
    return simulate(schedule, model).makespan - num_micro_batches * sum(work) / num_ranks


@pytest.mark.covering(1)
@pytest.mark.parametrize("chunks", [1, 2, 4])
@pytest.mark.parametrize(("num_ranks", "num_micro_batches"), [(4, 8), (5, 13), (8, 30)])
def test_interleaved_1f1b_without_exchange_idles_only_until_the_first_forward_arrives(
    chunks: int, num_ranks: int, num_micro_batches: int
) -> None:
    """The last rank waits (P-1)F/v. Micro-batches need not be a multiple of the ranks."""
    model = uniform(costs_of(0.0), num_ranks, num_ranks * chunks)
    assert overhead(num_ranks, num_micro_batches, model) == pytest.approx((num_ranks - 1) / chunks)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chunks", "costs", "most"),
    [
        (2, costs_of(0.5), 11.75),
        *exhaustive(
            (4, costs_of(1.0, latency=0.1), 20.4),
            (4, costs_of(1.5), 23.75),
            (4, costs_of(0.5), 8.0),
            (2, costs_of(1.0), 13.0),
            (4, costs_of(1.0), 10.5),
            (2, costs_of(1.0, backward_input=1.3), 19.55),
            (4, costs_of(1.0, backward_input=1.3), 16.3),
        ),
    ],
)
def test_interleaved_1f1b_8_ranks_32_micro_batches_is_at_most_that_long(chunks: int, costs: Costs, most: float) -> None:
    assert overhead(8, 32, uniform(costs, 8, 8 * chunks)) <= most + 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("cap", [1.0, 4.0])
def test_interleaved_1f1b_keeps_any_cap_of_one_micro_batch_or_more(cap: float) -> None:
    for exchange in (0.0, 1.0):
        overhead(3, 7, uniform(costs_of(exchange), 3, 6), cap)


@pytest.mark.slow
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
    schedule = build_schedule("interleaved_1f1b", 4, 7, model, 5.0)
    validate(schedule)
    assert max(simulate(schedule, model).peaks) <= 5.0 + 1e-9


COSTS = Costs(forward=1.0, backward_input=1.25, backward_weight=0.75, exchange=0.0, latency=0.0)


def sliced(num_ranks: int, num_sequences: int, slices: int) -> Schedule:
    costs = replace(uniform(COSTS, num_ranks, num_ranks), slices=slices)
    return build_schedule("sliced_1f1b", num_ranks, num_sequences * slices, costs)


def test_every_small_size_is_valid_within_its_memory_and_idle_time() -> None:
    for num_ranks, num_sequences, slices in product((1, 2, 3, 5), (1, 2, 4), (1, 2, 3, 5)):
        schedule = sliced(num_ranks, num_sequences, slices)
        size = f"P={num_ranks}, {num_sequences} sequences, {slices} slices"
        validate_passes(schedule)
        # At most 1 + (P - 1) / n sequences.
        assert max(peak_activations(schedule)) <= slices + num_ranks - 1, size
        simulation = simulate(schedule, uniform(COSTS, num_ranks, num_ranks))
        if num_sequences * slices >= num_ranks:
            # All ranks wait as long as under 1F1B with micro-batches of a slice's size.
            assert simulation.idle[0] == pytest.approx((num_ranks - 1) * 3.0, abs=1e-9), size


def test_slices_survive_json_and_passes() -> None:
    schedule = sliced(4, 3, 4)
    assert from_json(to_json(schedule)) == schedule
    assert '"slices": 4' in to_json(schedule)
    assert "slices" not in to_json(sliced(4, 3, 1))
    validate(split_backwards(schedule))
    validate(forward_only(schedule), forward_only=True)
    with pytest.raises(ScheduleError, match="slices: must be at least 1, is 0"):
        from_json(to_json(schedule).replace('"slices": 4', '"slices": 0'))


@pytest.mark.parametrize("kind", [Op.FORWARD, Op.BACKWARD, Op.BACKWARD_INPUT])
def test_validator_refuses_slices_in_the_wrong_order(kind: Op) -> None:
    schedule = sliced(1, 2, 3)
    if kind is Op.BACKWARD_INPUT:
        schedule = split_backwards(schedule)
    first, second = Operation(kind, 0, 0, 0), Operation(kind, 0, 0, 1)
    weights = first.with_kind(Op.BACKWARD_WEIGHT), second.with_kind(Op.BACKWARD_WEIGHT)
    swapped = {first: second, second: first, weights[0]: weights[1], weights[1]: weights[0]}
    groups = tuple(tuple(swapped.get(op, op) for op in group) for group in schedule.ranks[0])
    wrong, needed = (second, first) if kind is Op.FORWARD else (first, second)
    with pytest.raises(ScheduleError, match=rf"rank 0: group \d+ has {wrong} before or together with {needed}"):
        validate(replace(schedule, ranks=(groups,)))


def test_validator_refuses_slices_in_one_group() -> None:
    schedule = sliced(1, 1, 2)
    forwards, backwards = schedule.ranks[0][:2], schedule.ranks[0][2:]
    together = ((*forwards[0], *forwards[1]), *backwards)
    with pytest.raises(ScheduleError, match=r"has F0\.1 before or together with F0\.0, of the previous slice"):
        validate(replace(schedule, ranks=(together,)))


def test_sizes_that_slices_do_not_divide_are_refused() -> None:
    with pytest.raises(ScheduleError, match=r"num_micro_batches: must be a multiple of schedule.slices=4.*nearest: 12"):
        check_slices("sliced_1f1b", 13, 4)
    with pytest.raises(ScheduleError, match=r"schedule.slices: schedule 'dualpipe' runs whole .*dualpipe_interleaved"):
        build_schedule("dualpipe", 4, 8, replace(uniform(COSTS, 4, 4), slices=2))
    with pytest.raises(ScheduleError, match=r"slices: must be at least 1 and divide the 6 micro-batches, is 4"):
        validate(replace(sliced(2, 3, 2), slices=4))


def equal_times(exchange: float, latency: float = 0.0) -> Costs:
    return Costs(forward=1, backward_input=1, backward_weight=1, exchange=exchange, latency=latency)


def makespan(num_ranks: int, num_micro_batches: int, costs: Costs) -> float:
    """Returns the makespan for these costs, after validating the schedule with P + 2 activations."""
    schedule = dualpipe_interleaved(num_ranks, num_micro_batches, uniform(costs, num_ranks, num_ranks))
    validate(schedule, num_ranks + (2 if costs.exchange else 1))
    return simulate(schedule, costs).makespan


@pytest.mark.parametrize("num_ranks", [1, 2, 5, 8, *exhaustive(3, 4, 6, 7, *range(9, 17))])
def test_split_meets_the_lower_bound_for_equal_times_without_exchange(num_ranks: int) -> None:
    counts = {num_ranks, num_ranks + 1, 2 * num_ranks - 1, 2 * num_ranks, 3 * num_ranks + 1, 64, 65}
    for num_micro_batches in counts:
        found = makespan(num_ranks, num_micro_batches, equal_times(0))
        assert found == 3 * num_micro_batches + (num_ranks - 1) // 2


@pytest.mark.slow
@pytest.mark.parametrize(("num_ranks", "overhead"), [(2, 2), (5, 13), (8, 20)])
def test_split_hides_exchange_as_long_as_computation(num_ranks: int, overhead: int) -> None:
    assert makespan(num_ranks, 40, equal_times(1)) - 3 * 40 <= overhead


@pytest.mark.parametrize(("num_ranks", "num_micro_batches", "most"), [(4, 16, 16), (8, 32, 38)])
def test_split_fills_long_exchange_with_weight_gradients(num_ranks: int, num_micro_batches: int, most: int) -> None:
    assert makespan(num_ranks, num_micro_batches, equal_times(1.5)) - 3 * num_micro_batches <= most


@pytest.mark.slow
def test_split_has_no_latency_per_micro_batch() -> None:
    late = equal_times(0, latency=0.1)
    for counts in ((16, 48), (17, 49)):
        overheads = [makespan(8, count, late) - 3 * count for count in counts]
        assert overheads == pytest.approx([overheads[0]] * len(counts), abs=1e-9)


@pytest.mark.slow
def test_every_size_is_valid_for_uneven_stages_and_slices_and_its_makespan_is_that_of_the_event_clock() -> None:
    """For odd numbers of ranks, fewer sequences than ranks, and more slices than a ring of ranks holds."""
    generator = random.Random(5)
    sizes = ((1, 2, 3, 2), (2, 1, 1, 1), (3, 7, 1, 1), (3, 2, 4, 2), (5, 3, 2, 1))
    for num_ranks, num_sequences, slices, chunks in sizes:
        for zero in (False, True):
            activations = [generator.uniform(0.5, 2) for _ in range(num_ranks * chunks)]
            latency = generator.choice([0.0, 0.3])

            def stage(activation: float, *, zero: bool = zero) -> StageCosts:
                return StageCosts(
                    forward=0.0 if zero else generator.uniform(0.5, 2),
                    backward_input=generator.uniform(0.5, 2),
                    backward_weight=0.0 if zero else generator.uniform(0.5, 2),
                    forward_exchange=generator.choice([0.0, 3.0]),
                    backward_exchange=generator.choice([0.0, 1.0]),
                    activation=activation,
                )

            by_slice = [tuple(map(stage, activations)) for _ in range(slices)]
            costs = CostModel.of_slices([CostModel(stages=each, latency=latency, slices=slices) for each in by_slice])
            schedule = dualpipe_interleaved(num_ranks, num_sequences * slices, costs)
            validate_passes(schedule)
            cap = (num_ranks + 2) * chunks * slices * max(activations)
            assert max(peak_memory(schedule, costs)) <= cap + 1e-6
            makespan_found = simulate(schedule, costs).makespan
            assert makespan_found == pytest.approx(EventClock(schedule, costs).makespan)
            assert lower_bound(schedule, costs, cap).value <= makespan_found * (1 + 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("slices", "costs", "most"),
    [
        (2, costs_of(1.0), 3.5),
        *exhaustive(
            (4, costs_of(1.0), 1.75),
            (2, costs_of(0.5), 2.5),
            (2, costs_of(1.5), 10.75),
            (4, costs_of(1.5), 6.5),
            (2, costs_of(1.0, backward_input=1.3), 6.75),
            (4, costs_of(1.0, backward_input=1.3), 3.225),
            (2, costs_of(1.0, latency=0.1), 6.9),
            (4, costs_of(1.0, latency=0.1), 3.45),
        ),
    ],
)
def test_slices_of_32_sequences_on_8_ranks_take_at_most_that_long(slices: int, costs: Costs, most: float) -> None:
    """Times are those of whole sequences, and the peak is P + 2 of them."""
    times = {name: value / slices for name, value in asdict(costs).items() if value is not None and name != "latency"}
    model = replace(uniform(Costs(**times, latency=costs.latency), 8, 8), slices=slices)
    schedule = build_schedule("dualpipe_split", 8, 32 * slices, model)
    validate(schedule, 10 * slices)
    assert simulate(schedule, model).makespan - 3 * 32 <= most + 1e-9


@pytest.mark.slow
def test_split_keeps_small_caps_with_a_longer_makespan() -> None:
    cap = 2
    costs = uniform(equal_times(0), 4, 4)
    schedule = dualpipe_interleaved(4, 9, costs, cap)
    validate(schedule, cap)
    assert simulate(schedule, costs).makespan > 3 * 9 + 1


@pytest.mark.parametrize(("num_ranks", "chunks", "num_micro_batches"), [(1, 1, 4), (4, 1, 8), (4, 3, 8), (4, 2, 10)])
def test_megatron_1f1b_pairs_forwards_with_whole_backwards(num_ranks: int, chunks: int, num_micro_batches: int) -> None:
    """A rank's warm-up has one forward more than without overlap, so that no exchange of the middle is exposed."""
    model = uniform(costs_of(0.5), num_ranks, num_ranks * chunks)
    schedule = build_schedule("megatron_1f1b", num_ranks, num_micro_batches, model)
    validate(schedule)
    for rank, groups in enumerate(schedule.ranks):
        warm_up = min(2 * (num_ranks - 1 - rank) + (chunks - 1) * num_ranks + 1, chunks * num_micro_batches)
        pairs = chunks * num_micro_batches - warm_up
        kinds = [{op.kind for op in group} for group in groups]
        assert kinds.count({Op.FORWARD, Op.BACKWARD}) == pairs
        assert kinds.count({Op.FORWARD}) == kinds.count({Op.BACKWARD}) == warm_up
