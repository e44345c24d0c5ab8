"""The interpreter computes the right values and gradients and frees tensors in time."""

import pytest

from dualpipe.build import build
from dualpipe.ir import Schedule
from dualpipe.passes import forward_only
from dualpipe.runtime.compile import Pairing
from dualpipe.runtime.pairing import overlapped
from dualpipe.simulate.simulate import peak_activations
from tests.dualpipe.adding import PAIRINGS, SCHEDULES, Ran, lanes_of, name_of, run_threads


def assert_values(schedule: Schedule, ran: list[Ran], *, trained: bool) -> None:
    """Checks every micro-batch's output and input gradient in every stage."""
    numbers = range(schedule.num_stages)
    lanes = [lanes_of(stage, schedule.num_stages) for stage in numbers]
    added = [(stage + 1) * sum(10.0**phase for phase in range(len(lanes[stage]))) for stage in numbers]
    for direction in range(schedule.num_directions):
        for micro_batch in schedule.micro_batches_of(direction):
            start, key = (float(micro_batch), float(direction)), (direction, micro_batch)
            for number in numbers:
                stage = ran[schedule.rank_of(direction, number)].stages[number]
                assert stage.outputs[key] == [value + sum(added[: number + 1]) for value in start]
                doublings = sum(map(len, lanes[number:]))
                expected = [(value + sum(added)) * 2.0**doublings for value in start]
                assert stage.gradients.get(key) == (expected if trained else None)
                phases = [phase for phase, lane in enumerate(lanes[number]) if lane == "compute"]
                assert sorted(stage.weights.get(key, [])) == (phases if trained else [])


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=name_of)
def test_interpreter_computes_values_and_keeps_only_the_activations_of_the_schedule(
    schedule: Schedule, pairing: Pairing
) -> None:
    # The journals raise if a message or an activation is kept for too long.
    ran = run_threads(schedule, pairing)
    assert_values(schedule, ran, trained=True)
    peaks = peak_activations(schedule)
    assert tuple(rank.execution.peak_runs for rank in ran) == peaks
    assert tuple(rank.journal.peak for rank in ran) == peaks


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name_of)
def test_forward_only_program_keeps_at_most_a_group(schedule: Schedule) -> None:
    forwards = forward_only(schedule)
    ran = run_threads(forwards, overlapped)
    assert_values(forwards, ran, trained=False)
    assert all(rank.execution.peak_runs <= peak for rank, peak in zip(ran, peak_activations(forwards), strict=True))


def test_published_dualpipe_keeps_one_activation_more_than_ranks() -> None:
    ran = run_threads(build("dualpipe", 4, 8), overlapped)
    assert max(rank.journal.peak for rank in ran) == 5
