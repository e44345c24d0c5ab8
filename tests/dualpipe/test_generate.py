"""Generators make the published orders, which are valid for every accepted size."""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dualpipe.bounds import lower_bound
from dualpipe.builder import build_schedule
from dualpipe.costs import Costs, uniform
from dualpipe.generate.dualpipe import dualpipe, dualpipe_v, mirror
from dualpipe.generate.dualpipe_interleaved import dualpipe_interleaved
from dualpipe.generate.one_f_one_b import one_f_one_b
from dualpipe.generate.zb1p import zb1p
from dualpipe.generate.zero_bubble import v_half, v_min, zb_v
from dualpipe.ir import Op, Schedule, ScheduleError, to_json
from dualpipe.passes import forward_only
from dualpipe.registry import SCHEDULES, check_size
from dualpipe.simulation import peak_activations, simulate
from dualpipe.validate import validate
from tests.covering import exhaustive
from tests.dualpipe.random_schedules import random_schedule, v_shaped

GOLDEN = Path(__file__).parent / "golden"
SHA256: dict[str, str] = json.loads((GOLDEN / "dualpipe_sha256.json").read_text())
SHA256_V: dict[str, str] = json.loads((GOLDEN / "dualpipe_v_sha256.json").read_text())
EQUAL = Costs(forward=1, backward_input=1, backward_weight=1, exchange=0, latency=0)


def sha256(schedule: Schedule) -> str:
    return hashlib.sha256(to_json(schedule).encode()).hexdigest()


def test_dualpipe_4_ranks_8_micro_batches_is_the_published_order() -> None:
    assert json.loads(to_json(build_schedule("dualpipe", 4, 8))) == json.loads(
        (GOLDEN / "dualpipe_4_8.json").read_text()
    )


def test_dualpipe_is_the_published_order() -> None:
    for size, expected in SHA256.items():
        num_ranks, num_micro_batches = map(int, size.split(","))
        assert sha256(build_schedule("dualpipe", num_ranks, num_micro_batches)) == expected, size


def test_dualpipe_v_3_ranks_7_micro_batches_is_the_published_order() -> None:
    assert json.loads(to_json(dualpipe_v(3, 7))) == json.loads((GOLDEN / "dualpipe_v_3_7.json").read_text())


@pytest.mark.slow
def test_dualpipe_v_is_the_published_order() -> None:
    for size, expected in SHA256_V.items():
        num_ranks, num_micro_batches = map(int, size.split(","))
        assert sha256(dualpipe_v(num_ranks, num_micro_batches)) == expected, size


def half_of_1f1b(num_ranks: int) -> float:
    """Returns the memory law of `v_half` in activations of model/P."""
    return num_ranks / 2 + 1


def third_of_1f1b(num_ranks: int) -> float:
    """Returns the memory law of `v_min` in activations of model/P."""
    return (2 * num_ranks // 3 + 3) / 2


@pytest.mark.parametrize("num_ranks", [1, 2, 5, *exhaustive(3, 4, 6, 7, 8, 9, 10)])
@pytest.mark.parametrize(
    ("kind", "most_alive"),
    [
        ("dualpipe", lambda num_ranks: num_ranks + 1),
        ("dualpipe_v", lambda num_ranks: num_ranks + 0.5),
        ("1f1b", float),
        ("zb_v", float),
        ("v_half", half_of_1f1b),
        ("v_min", third_of_1f1b),
    ],
)
def test_published_kind_is_valid_within_its_activations(
    kind: str, most_alive: Callable[[int], float], num_ranks: int
) -> None:
    is_double = kind.startswith("dualpipe")
    for num_micro_batches in range(2 * num_ranks if is_double else 1, 3 * num_ranks + 3):
        if SCHEDULES.get(kind).limit(num_ranks, num_micro_batches) is not None:
            continue
        schedule = build_schedule(kind, num_ranks, num_micro_batches)
        validate(schedule, memory_cap=most_alive(num_ranks))
        validate(forward_only(schedule), forward_only=True)
        if kind == "1f1b":
            expected = tuple(min(num_ranks - rank, num_micro_batches) for rank in range(num_ranks))
            assert peak_activations(schedule) == expected
        elif not is_double:
            kinds = {op.kind for groups in schedule.ranks for (op,) in groups}
            assert kinds == {Op.FORWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT}


@pytest.mark.parametrize("num_ranks", [3, 6, *exhaustive(4, 5, *range(7, 17))])
@pytest.mark.parametrize(
    ("make", "overhead", "peak"),
    [
        (zb1p, lambda num_ranks: num_ranks - 1, float),
        (zb_v, lambda num_ranks: 0.5 * (num_ranks - 1), float),
        (v_half, lambda num_ranks: 1.5 * num_ranks - 2.5, half_of_1f1b),
        (v_min, lambda num_ranks: 2 * num_ranks - 2.5, third_of_1f1b),
    ],
)
def test_split_backwards_reach_the_published_overhead_and_peak(
    make: Callable[[int, int], Schedule], overhead: Callable[[int], float], peak: Callable[[int], float], num_ranks: int
) -> None:
    for num_micro_batches in (2 * num_ranks, 2 * num_ranks + 1, 3 * num_ranks + 2, 5 * num_ranks):
        simulation = simulate(make(num_ranks, num_micro_batches), EQUAL)
        assert simulation.makespan - 3 * num_micro_batches == overhead(num_ranks)
        assert max(simulation.peaks) == peak(num_ranks)


def test_dualpipe_large_is_made_and_proven_within_seconds() -> None:
    # A bound on the order of growth: the work takes about half a second, quadratic work would take minutes.
    start = time.process_time()
    validate(build_schedule("dualpipe", 16, 512), memory_cap=17)
    assert time.process_time() - start < 5


def test_forward_only_keeps_the_order_of_forwards_and_nothing_else() -> None:
    schedule = build_schedule("dualpipe", 6, 14)
    kept = forward_only(schedule)
    for groups, before in zip(kept.ranks, schedule.ranks, strict=True):
        assert all(groups)
        forwards = [op for group in before for op in group if op.kind is Op.FORWARD]
        assert [op for group in groups for op in group] == forwards
    assert (kept.kind, kept.placement, kept.num_micro_batches) == ("dualpipe", schedule.placement, 14)


@pytest.mark.parametrize(
    ("kind", "num_ranks", "num_micro_batches", "message"),
    [
        (
            "dualpipe",
            3,
            8,
            r"^here: .*even number of pipeline ranks, has 3; nearest: 2 or 4, or schedule=dualpipe_split$",
        ),
        ("dualpipe", 0, 8, r"^here: .*at least 1 rank, has 0; nearest: 1$"),
        (
            "dualpipe",
            4,
            6,
            r"^there: .*at least 8 micro-batches \(2 per rank\), has 6; nearest: 8, or schedule=dualpipe_split$",
        ),
        (
            "dualpipe",
            4,
            9,
            r"^there: .*even number of micro-batches.* has 9; nearest: 8 or 10, or schedule=dualpipe_split$",
        ),
        ("dualpipe_v", 3, 5, r"^there: .*at least 6 micro-batches .* has 5; nearest: 6, or schedule=dualpipe_split$"),
        ("dualpipe", 4, 0, r"^there: .*at least 1 micro-batch, has 0; nearest: 1$"),
    ],
)
def test_rejected_sizes_name_key_rule_value_and_nearest(
    kind: str, num_ranks: int, num_micro_batches: int, message: str
) -> None:
    with pytest.raises(ScheduleError, match=message):
        check_size(kind, num_ranks, num_micro_batches, ranks_key="here", micro_batches_key="there")
    with pytest.raises(ScheduleError, match=r"^num_(ranks|micro_batches): "):
        build_schedule(kind, num_ranks, num_micro_batches)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_mirror_of_dualpipe_v_is_dualpipe(num_ranks: int) -> None:
    for num_micro_batches in range(2 * num_ranks, 2 * num_ranks + 4):
        unfolded = mirror(dualpipe_v(num_ranks, num_micro_batches))
        assert replace(unfolded, kind="dualpipe") == dualpipe(2 * num_ranks, 2 * num_micro_batches)


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_mirror_keeps_time_and_memory(num_ranks: int) -> None:
    for num_micro_batches in range(1, 2 * num_ranks + 3):
        for folded in (
            zb_v(num_ranks, num_micro_batches),
            random_schedule(v_shaped(num_ranks), num_micro_batches, seed=num_micro_batches),
        ):
            before, after = simulate(folded, EQUAL), simulate(mirror(folded), EQUAL)
            # On h ranks a stage is half of a rank's share of the model, on 2h ranks all of it.
            assert after.makespan == 2 * before.makespan
            peaks = tuple(2 * peak for peak in before.peaks)
            assert after.peaks == (*peaks, *reversed(peaks))


@pytest.mark.parametrize(
    ("schedule", "problem"),
    [
        (dualpipe(2, 4), r"^placement: schedule 'dualpipe' cannot be mirrored: must have one direction, has 2$"),
        (one_f_one_b(4, 4), r"^placement\[0\]: .*must have 2 stages per rank, 8, has 4$"),
        (
            replace(zb_v(2, 2), placement=((0, 1, 0, 1),)),
            r"^placement\[0\]\[2\]: .*in a V of 2 ranks it must be 1, is 0$",
        ),
        (replace(zb_v(2, 2), ranks=((), ((), (), ()), ())), r"^ranks: .*must have num_ranks = 2 entries, has 3$"),
        (
            replace(zb_v(2, 2), ranks=tuple(reversed(zb_v(2, 2).ranks))),
            r"^rank 0: group 0: .*F1\.0 belongs to a stage of another rank$",
        ),
    ],
)
def test_mirror_rejects_other_shapes(schedule: Schedule, problem: str) -> None:
    with pytest.raises(ScheduleError, match=problem):
        mirror(schedule)


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


@pytest.mark.parametrize(("num_ranks", "chunks", "most"), [(8, 2, 1.5), (6, 3, 5 / 6), *exhaustive((16, 4, 1.75))])
def test_interleaved_idles_by_its_formula_without_exchange(num_ranks: int, chunks: int, most: float) -> None:
    assert overhead(num_ranks, 4 * num_ranks, equal_times(0), chunks) <= most + 1e-9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chunks", "exchange", "most"), [(2, 0.5, 8.0), *exhaustive((4, 0.5, 6.0), (4, 1.0, 12.0), (4, 1.5, 30.0))]
)
def test_interleaved_hides_exchange(chunks: int, exchange: float, most: float) -> None:
    assert overhead(8, 32, equal_times(exchange), chunks) <= most
