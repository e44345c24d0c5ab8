"""Tests of schedules that decode: complete, in order, without deadlock, and nearly without idle time."""

import random
from dataclasses import replace

import pytest

from dualpipe.decode import decode
from dualpipe.ir import (
    Op,
    Operation,
    Placement,
    Schedule,
    ScheduleError,
    from_json,
    mirrored_placement,
    straight_placement,
    to_json,
    v_placement,
)
from dualpipe.simulate.costs import Costs
from dualpipe.simulate.simulate import simulate
from dualpipe.validate import validate
from tests.dualpipe.messages import transfers

PLACEMENTS: dict[str, Placement] = {
    f"{name} {num_ranks}x{chunks}": place(num_ranks, chunks)
    for name, place, sizes in (
        ("straight", straight_placement, (1,)),
        ("v", v_placement, (2,)),
        ("mirrored", mirrored_placement, (1, 2, 3)),
    )
    for num_ranks in (1, 2, 3, 4, 5, 8)
    for chunks in sizes
}


def costs(latency: float) -> Costs:
    return Costs(forward=1.0, backward_input=1.0, backward_weight=1.0, exchange=0.0, latency=latency)


def num_ranks_of(placement: Placement) -> int:
    return 1 + max(placement[0])


@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS)
def test_decode_schedules_are_valid_and_keep_tokens_in_order(placement: Placement) -> None:
    for cohorts in (1, 2, 3, num_ranks_of(placement), 3 * num_ranks_of(placement)):
        for rounds in (1, 2, 5):
            schedule = decode(placement, cohorts, rounds)
            validate(schedule, forward_only=True)
            assert from_json(to_json(schedule)) == schedule
            simulation, ends = simulate(schedule, costs(0.25)), {}
            starts = {}
            for rank, groups in enumerate(schedule.ranks):
                for index, group in enumerate(groups):
                    starts[group[0]], ends[group[0]] = simulation.starts[rank][index], simulation.ends[rank][index]
            assert len(ends) == schedule.num_micro_batches * schedule.num_stages
            for op, start in starts.items():
                if op.micro_batch >= cohorts:
                    tokens = Operation(Op.FORWARD, op.direction, schedule.num_stages - 1, op.micro_batch - cohorts)
                    assert start >= ends[tokens], (op, tokens)


@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS)
def test_decode_with_two_cohorts_per_rank_is_idle_at_most_a_tenth_of_the_time(placement: Placement) -> None:
    num_ranks = num_ranks_of(placement)
    schedule = decode(placement, -(-2 * num_ranks // len(placement)), 8)
    for latency in (0.0, 0.1):
        simulation = simulate(schedule, costs(latency * num_ranks / schedule.num_stages))
        assert simulation.bubble_fraction <= 0.1, latency
        assert max(simulation.idle) <= 0.1 * simulation.makespan, latency


def test_decode_with_too_few_cohorts_leaves_ranks_idle() -> None:
    """Ensures that the test above can fail."""
    schedule = decode(mirrored_placement(4), 1, 8)
    assert simulate(schedule, costs(0.0)).bubble_fraction > 0.4


def test_decode_transfers_tokens_of_every_pass_but_the_last() -> None:
    for placement in (mirrored_placement(4), straight_placement(3), v_placement(2)):
        schedule = decode(placement, 3, 4)
        messages = [message for rank in transfers(schedule) for message in rank.all_sends]
        assert sorted(messages) == sorted(message for rank in transfers(schedule) for message in rank.all_receives)
        tokens = [message for message in messages if message.kind == "tokens"]
        crosses = placement[0][0] != placement[0][-1]
        assert len(tokens) == (3 * 3 * len(placement) if crosses else 0)
        assert all(message.stage == schedule.num_stages - 1 for message in tokens)


def test_decode_with_operations_in_a_wrong_order_is_refused() -> None:
    """Moves random operations. A later simulation, which is another implementation, decides which orders are wrong."""
    generator, refused, accepted = random.Random(5), 0, 0
    for placement in (mirrored_placement(4), straight_placement(3), v_placement(2), mirrored_placement(1)):
        for _ in range(40):
            schedule = decode(placement, 2, 3)
            rank = generator.randrange(schedule.num_ranks)
            groups = list(schedule.ranks[rank])
            groups.insert(generator.randrange(len(groups)), groups.pop(generator.randrange(len(groups))))
            ranks = (*schedule.ranks[:rank], tuple(groups), *schedule.ranks[rank + 1 :])
            changed = replace(schedule, ranks=ranks)
            try:
                validate(changed, forward_only=True)
            except ScheduleError:
                refused += 1
                continue
            simulate(changed, costs(0.0))
            accepted += 1
    assert refused > 20
    assert accepted > 5


def test_decode_that_never_feeds_tokens_back_is_refused() -> None:
    schedule = decode(mirrored_placement(1), 2, 2)
    (groups,) = schedule.ranks
    with pytest.raises(ScheduleError, match=r"rank 0: group 0 has F0\.2 before the tokens that it reads, from F0\.0"):
        validate(_with(schedule, (groups[4:] + groups[:4],)), forward_only=True)
    with pytest.raises(ScheduleError, match="has F but no backward"):
        validate(schedule)
    with pytest.raises(ScheduleError, match="cohorts: a schedule that decodes needs at least 1"):
        decode(mirrored_placement(2), 0, 1)


def _with(schedule: Schedule, ranks: tuple[object, ...]) -> Schedule:
    return replace(schedule, ranks=ranks)  # type: ignore[arg-type]
