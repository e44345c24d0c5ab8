"""Offload keeps caps at no cost on a fast link, and schedules that decode are complete and in order."""

import random
from collections import Counter
from dataclasses import replace

import pytest

from dualpipe.bounds import lower_bound
from dualpipe.builder import build_schedule, decode
from dualpipe.costs import CostModel, Costs, uniform
from dualpipe.ir import (
    MemoryCapError,
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
from dualpipe.passes import offload
from dualpipe.registry import SCHEDULES, ScheduleSpec
from dualpipe.simulation import peak_memory, simulate
from dualpipe.validate import validate
from tests.dualpipe.enactment import enact
from tests.dualpipe.event_clock import EventClock
from tests.dualpipe.messages import transfers
from tests.dualpipe.random_schedules import bidirectional, looped, random_schedule, straight

SIZES = {"1f1b": (4, 9), "zb_v": (3, 7), "dualpipe": (4, 10), "dualpipe_v": (3, 7)}

DRAWN = [
    random_schedule(straight(3), 6, 0),
    random_schedule(bidirectional(3), 5, 1),
    random_schedule(looped(2, 2), 5, 2),
]


def costs_of(schedule: Schedule, time: float | None, exchange: float = 0.0) -> CostModel:
    costs = Costs(forward=1, backward_input=1, backward_weight=1, exchange=exchange, latency=0, offload=time)
    return uniform(costs, schedule.num_ranks, schedule.num_stages)


def least_cap(schedule: Schedule, costs: CostModel) -> float:
    """Returns the most memory of the activations that a group uses, from F to W of whole micro-batches."""
    weights = [stage.activation for stage in costs.stages]
    return max(sum(weights[op.stage] for op in group) for groups in schedule.ranks for group in groups)


@pytest.mark.covering(1)
@pytest.mark.parametrize("time", [0.0, 0.7, 3.0])
@pytest.mark.parametrize("kind", SIZES)
def test_offload_keeps_every_cap_that_the_operations_in_use_allow(kind: str, time: float) -> None:
    schedule = build_schedule(kind, *SIZES[kind])
    costs = costs_of(schedule, time)
    peak = max(peak_memory(schedule, costs))
    for cap in {peak, (peak + least_cap(schedule, costs)) / 2, least_cap(schedule, costs)}:
        moved = offload(schedule, costs, cap)
        assert moved is not None, cap
        validate(moved, cap)
        assert enact(moved).problem is None
        clock, simulation = EventClock(moved, costs), simulate(moved, costs)
        assert max(clock.peaks) <= cap + 1e-9
        assert clock.makespan == pytest.approx(simulation.makespan)
        assert simulation.makespan >= lower_bound(schedule, costs, cap).value - 1e-9


@pytest.mark.parametrize("schedule", DRAWN, ids=lambda schedule: f"{schedule.num_directions}x{schedule.num_stages}")
def test_offload_of_random_schedules_is_valid_or_refused(schedule: Schedule) -> None:
    costs = costs_of(schedule, 0.5, exchange=1.0)
    kept = 0
    for cap in (1.0, 2.0, 3.0, 4.0, 5.0):
        moved = offload(schedule, costs, cap)
        if moved is not None:
            validate(moved, cap)
            assert enact(moved).problem is None
            kept += 1
    assert kept >= 2


@pytest.mark.parametrize(("kind", "exchange"), [("1f1b", 0.0), ("dualpipe", 0.0), ("dualpipe", 1.0)])
def test_half_of_the_peak_costs_no_time_if_a_copy_takes_as_long_as_a_forward(kind: str, exchange: float) -> None:
    """The claim of arXiv:2503.01328: about half of all activations can be offloaded at nearly no cost."""
    schedule = build_schedule(kind, 8, 32)
    costs = costs_of(schedule, 1.0, exchange)
    moved = offload(schedule, costs, 4.0)
    assert moved is not None
    assert simulate(moved, costs).makespan == pytest.approx(simulate(schedule, costs).makespan)
    assert max(simulate(moved, costs).peaks) == 4.0 <= 0.5 * max(peak_memory(schedule, costs))


def test_offload_keeps_the_order_and_waits_for_a_slow_link() -> None:
    schedule = build_schedule("1f1b", 4, 8)
    fast, slow = (offload(schedule, costs_of(schedule, time), 2.0) for time in (0.5, 6.0))
    assert fast is not None
    assert slow is not None
    for moved in (fast, slow):
        kept = tuple(tuple(group for group in groups if not group[0].kind.is_copy) for groups in moved.ranks)
        assert replace(moved, ranks=kept) == schedule
    costs = costs_of(schedule, 6.0)
    assert simulate(slow, costs).makespan > simulate(schedule, costs).makespan


def test_stages_that_must_stay_are_not_offloaded() -> None:
    schedule = build_schedule("1f1b", 3, 6)
    costs = costs_of(schedule, 1.0)
    first = replace(costs, stages=(replace(costs.stages[0], offload=None), *costs.stages[1:]))
    assert offload(schedule, costs, 2.0) is not None
    assert offload(schedule, first, 2.0) is None


def test_build_offloads_only_if_costs_allow_it_and_a_cap_asks_for_it() -> None:
    costs = costs_of(build_schedule("1f1b", 4, 8), 1.0)
    assert not build_schedule("1f1b", 4, 8, costs).has_offload
    assert not build_schedule("1f1b", 4, 8, costs, 4.0).has_offload
    assert build_schedule("1f1b", 4, 8, costs, 2.0).has_offload
    with pytest.raises(MemoryCapError, match="keeps 4 live activations"):
        build_schedule("1f1b", 4, 8, costs.without_offload(), 2.0)


@pytest.mark.parametrize("kind", ["dualpipe_split", "sliced_1f1b"])
def test_build_offloads_slices_of_sequences(kind: str) -> None:
    costs = replace(costs_of(build_schedule(kind, 2, 8), 0.2), slices=2)
    moved = build_schedule(kind, 2, 8, costs, 2.0)
    validate(moved, 2.0)
    assert moved.slices == 2
    assert moved.has_offload


def one_by_one(num_ranks: int, num_micro_batches: int, costs: CostModel, memory_cap: float | None) -> Schedule:
    """Returns 1F1B, or one micro-batch after the other if the cap is too small for it."""
    schedule = build_schedule("1f1b", num_ranks, num_micro_batches)
    if memory_cap is None or memory_cap >= num_ranks:
        return schedule
    ordered = (sorted(groups, key=lambda group: group[0].micro_batch) for groups in schedule.ranks)
    return replace(schedule, ranks=tuple(map(tuple, ordered)))


def test_build_offloads_if_that_takes_less_time_than_a_schedule_for_the_cap() -> None:
    SCHEDULES.register("either", ScheduleSpec(name="either", summary="", generate=one_by_one, takes_costs=True))
    try:
        makespans = []
        for time in (0.5, 20.0):
            costs = costs_of(build_schedule("1f1b", 4, 8), time)
            best = build_schedule("either", 4, 8, costs, 2.0)
            validate(best, 2.0)
            makespans.append(simulate(best, costs).makespan)
            assert best.has_offload == (time < 1)
        assert makespans[0] == simulate(build_schedule("1f1b", 4, 8), costs).makespan < makespans[1]
    finally:
        SCHEDULES.remove(["either"])


def test_host_memory_holds_what_the_device_does_not() -> None:
    schedule = build_schedule("1f1b", 4, 8)
    costs = costs_of(schedule, 0.5)
    moved = offload(schedule, costs, 2.0)
    assert moved is not None
    simulation = simulate(moved, costs)
    assert simulate(schedule, costs).host_peaks == (0.0,) * 4
    for rank, (peak, host) in enumerate(zip(simulation.peaks, simulation.host_peaks, strict=True)):
        assert peak + host >= simulate(schedule, costs).peaks[rank]
        kinds = Counter(copy.operation.kind for copy in simulation.copies[rank])
        assert kinds[Op.OFFLOAD] == kinds[Op.RELOAD] >= host


PLACEMENTS: dict[str, Placement] = {
    f"{name} {num_ranks}x{chunks}": place(num_ranks, chunks)
    for name, place, sizes in (
        ("straight", straight_placement, (1,)),
        ("v", v_placement, (2,)),
        ("mirrored", mirrored_placement, (1, 2)),
    )
    for num_ranks in (1, 3, 4)
    for chunks in sizes
}


def costs(latency: float) -> Costs:
    return Costs(forward=1.0, backward_input=1.0, backward_weight=1.0, exchange=0.0, latency=latency)


def num_ranks_of(placement: Placement) -> int:
    return 1 + max(placement[0])


@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS)
def test_decode_schedules_are_valid_and_keep_tokens_in_order(placement: Placement) -> None:
    for cohorts in (1, 2, 3, num_ranks_of(placement), 3 * num_ranks_of(placement)):
        for rounds in (1, 3):
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
