"""Schedules of slices: order, memory, idle time, and what the validator refuses."""

from dataclasses import replace
from itertools import product

import pytest

from dualpipe.build import build
from dualpipe.ir import Op, Operation, Schedule, ScheduleError, from_json, to_json
from dualpipe.passes import forward_only, split_backwards
from dualpipe.registry import check_slices
from dualpipe.simulate.costs import Costs, uniform
from dualpipe.simulate.simulate import peak_activations, simulate
from dualpipe.validate import validate, validate_passes

COSTS = Costs(forward=1.0, backward_input=1.25, backward_weight=0.75, exchange=0.0, latency=0.0)


def sliced(num_ranks: int, num_sequences: int, slices: int) -> Schedule:
    costs = replace(uniform(COSTS, num_ranks, num_ranks), slices=slices)
    return build("sliced_1f1b", num_ranks, num_sequences * slices, costs)


def test_every_small_size_is_valid_within_its_memory_and_idle_time() -> None:
    for num_ranks, num_sequences, slices in product(range(1, 7), range(1, 6), range(1, 6)):
        schedule = sliced(num_ranks, num_sequences, slices)
        size = f"P={num_ranks}, {num_sequences} sequences, {slices} slices"
        validate_passes(schedule)
        # At most 1 + (P - 1) / n sequences.
        assert max(peak_activations(schedule)) <= slices + num_ranks - 1, size
        simulation = simulate(schedule, uniform(COSTS, num_ranks, num_ranks))
        if num_sequences * slices >= num_ranks:
            # All ranks wait as long as under 1F1B with micro-batches of a slice's size.
            assert simulation.idle[0] == pytest.approx((num_ranks - 1) * 3.0, abs=1e-9), size


def test_one_slice_is_1f1b() -> None:
    plain = build("1f1b", 4, 9)
    assert sliced(4, 9, 1).ranks == plain.ranks


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


def test_validator_refuses_offloaded_slices() -> None:
    schedule = sliced(1, 1, 2)
    first, second, *backwards = schedule.ranks[0]
    copies = (Operation(Op.OFFLOAD, 0, 0, 0),), (Operation(Op.RELOAD, 0, 0, 0),)
    with pytest.raises(ScheduleError, match=r"has O0\.0; slices of sequences cannot be offloaded"):
        validate(replace(schedule, ranks=((first, second, *copies, *backwards),)))


def test_sizes_that_slices_do_not_divide_are_refused() -> None:
    with pytest.raises(ScheduleError, match=r"num_micro_batches: must be a multiple of schedule.slices=4.*nearest: 12"):
        check_slices("sliced_1f1b", 13, 4)
    with pytest.raises(ScheduleError, match=r"schedule.slices: schedule 'dualpipe' runs whole sequences.*sliced_1f1b"):
        build("dualpipe", 4, 8, replace(uniform(COSTS, 4, 4), slices=2))
    with pytest.raises(ScheduleError, match=r"slices: must be at least 1 and divide the 6 micro-batches, is 4"):
        validate(replace(sliced(2, 3, 2), slices=4))
