"""Every registered kind of schedule keeps these laws, including those of `pytest --plugins FILE`."""

from collections.abc import Sequence
from functools import cache
from itertools import product

import pytest

from dualpipe.bounds import lower_bound
from dualpipe.builder import build_schedule
from dualpipe.costs import Costs, uniform
from dualpipe.ir import MemoryCapError, Schedule, ScheduleError, from_json, to_json
from dualpipe.passes import forward_only
from dualpipe.registry import FALLBACK, SCHEDULES, check_size, kind_for_size
from dualpipe.simulation import peak_activations, simulate
from dualpipe.validate import validate
from tests.dualpipe.enactment import enact

EQUAL = Costs(forward=1, backward_input=1, backward_weight=1, exchange=0, latency=0)
MOST_RANKS = 4
MOST_CHUNKS = 3
EVERY_KIND = pytest.mark.parametrize("kind", SCHEDULES.names())


def accepted_sizes(kind: str, numbers_of_ranks: Sequence[int] = range(1, MOST_RANKS + 1)) -> list[tuple[int, int]]:
    """Returns all small numbers of ranks and micro-batches for which the kind is defined."""
    every = [(ranks, batches) for ranks in numbers_of_ranks for batches in range(1, 2 * ranks + 4)]
    return [size for size in every if SCHEDULES.get(kind).limit(*size) is None]


def accepted_shapes(kind: str) -> list[tuple[int, int, int]]:
    """Returns all small numbers of ranks and micro-batches, with one, two and three chunks in turn."""
    chunks = few_chunks(kind)
    return [(*size, chunks[sum(size) % len(chunks)]) for size in accepted_sizes(kind)]


def few_chunks(kind: str) -> list[int]:
    return [number for number in SCHEDULES.get(kind).chunks if number <= MOST_CHUNKS]


@cache
def schedules_of(kind: str) -> tuple[Schedule, ...]:
    return tuple(build_shape(kind, *shape) for shape in accepted_shapes(kind))


def build_shape(kind: str, num_ranks: int, num_micro_batches: int, chunks: int) -> Schedule:
    return build_schedule(kind, num_ranks, num_micro_batches, uniform(EQUAL, num_ranks, num_ranks * chunks))


def name_of(schedule: Schedule) -> str:
    sizes = f"{schedule.num_ranks} ranks, {schedule.num_micro_batches} micro-batches and {schedule.num_stages} stages"
    return f"{schedule.kind} of {sizes}"


@pytest.mark.slow
@EVERY_KIND
def test_registered_kind_is_valid_for_all_small_sizes(kind: str) -> None:
    assert schedules_of(kind), f"{kind} accepts no small size"
    for schedule, (ranks, batches, chunks) in zip(schedules_of(kind), accepted_shapes(kind), strict=True):
        built = schedule.kind, schedule.num_ranks, schedule.num_micro_batches, schedule.num_stages
        assert built == (kind, ranks, batches, ranks * chunks), name_of(schedule)
        validate(schedule)
        validate(forward_only(schedule), forward_only=True)


@EVERY_KIND
def test_registered_kind_computes_what_one_rank_does(kind: str) -> None:
    """Uses an oracle that shares no code with the validator and also counts live activations."""
    for schedule in schedules_of(kind):
        enacted = enact(schedule, seed=schedule.num_micro_batches)
        assert enacted.problem is None, f"{name_of(schedule)}: {enacted.problem}"
        assert enacted.peaks == peak_activations(schedule), name_of(schedule)


@EVERY_KIND
def test_registered_kind_is_deterministic_and_keeps_its_json_form(kind: str) -> None:
    for schedule in schedules_of(kind):
        assert from_json(to_json(schedule)) == schedule, name_of(schedule)
    *_, last = accepted_shapes(kind)
    assert to_json(build_shape(kind, *last)) == to_json(schedules_of(kind)[-1])


@EVERY_KIND
def test_registered_kind_idles_by_its_formula(kind: str) -> None:
    formula = SCHEDULES.get(kind).idle
    if formula is None:
        pytest.skip(f"{kind} has no published formula")
    for schedule in schedules_of(kind):
        if schedule.num_micro_batches >= 2 * schedule.num_ranks:
            expected = formula.value(schedule.num_ranks, EQUAL)
            idle = simulate(schedule, EQUAL).idle
            assert idle == pytest.approx((expected,) * schedule.num_ranks), f"{name_of(schedule)}: {formula.text}"


@EVERY_KIND
def test_registered_kind_is_not_below_the_lower_bound(kind: str) -> None:
    for schedule in schedules_of(kind):
        costs = uniform(EQUAL, schedule.num_ranks, schedule.num_stages)
        simulation = simulate(schedule, costs)
        cap = max(simulation.peaks)
        assert simulation.makespan >= lower_bound(schedule, costs, cap).value - 1e-9, name_of(schedule)


@pytest.mark.slow
@EVERY_KIND
def test_registered_kind_keeps_the_memory_cap_or_rejects_it(kind: str) -> None:
    for schedule in schedules_of(kind)[-3:]:
        size = schedule.num_ranks, schedule.num_micro_batches
        costs = uniform(EQUAL, schedule.num_ranks, schedule.num_stages)
        peak = max(simulate(schedule, costs).peaks)
        validate(build_schedule(kind, *size, costs, memory_cap=peak), memory_cap=peak)
        with pytest.raises(MemoryCapError, match="nearest: ") as refused:
            build_schedule(kind, *size, costs, memory_cap=0.25)
        validate(build_schedule(kind, *size, costs, memory_cap=refused.value.least), memory_cap=refused.value.least)


@EVERY_KIND
def test_registered_kind_names_sizes_that_it_accepts(kind: str) -> None:
    """An error names the nearest valid values, and the kind that accepts every size."""
    spec = SCHEDULES.get(kind)
    for ranks in range(1, MOST_RANKS + 1):
        for batches in range(1, 2 * ranks + 4):
            limit = spec.limit(ranks, batches)
            if limit is None:
                continue
            with pytest.raises(ScheduleError, match=f"schedule '{kind}' .*schedule={FALLBACK}"):
                check_size(kind, ranks, batches)
            for value in limit.nearest:
                size = (value, 64) if limit.about == "num_ranks" else (ranks, value)
                assert spec.limit(*size) is None, f"{kind}: {ranks} ranks and {batches} micro-batches: {size}"


@EVERY_KIND
def test_registered_kind_describes_itself(kind: str) -> None:
    spec = SCHEDULES.get(kind)
    assert spec.name == kind
    assert spec.summary
    assert "\n" not in spec.summary
    assert spec.is_bidirectional() == (schedules_of(kind)[0].num_directions == 2)


@EVERY_KIND
def test_kind_for_size_keeps_the_placement(kind: str) -> None:
    """It is the kind itself where that is defined, else another one with the same placement, or none."""
    spec = SCHEDULES.get(kind)
    for chunks, ranks, batches in product(spec.chunk_choices(None), range(1, MOST_RANKS + 1), range(1, 14)):
        is_defined = spec.limit(ranks, batches) is None
        try:
            chosen = SCHEDULES.get(kind_for_size(kind, ranks, batches, chunks))
        except ScheduleError:
            assert not is_defined
            continue
        assert (chosen.name == kind) == is_defined
        assert chosen.limit(ranks, batches) is None
        assert chosen.placement(ranks, chunks) == spec.placement(ranks, chunks)


def test_kind_for_size_prefers_the_fallback() -> None:
    assert [kind_for_size("dualpipe", 4, batches, 1) for batches in (7, 8, 9, 10)] == [
        FALLBACK, "dualpipe", FALLBACK, "dualpipe"
    ]  # fmt: skip
    assert [kind_for_size("dualpipe_v", 4, batches, 2) for batches in (7, 8)] == ["zb_v", "dualpipe_v"]
