"""Generators make the published orders, which are valid for every accepted size."""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dualpipe.build import build
from dualpipe.generate.dualpipe import dualpipe, dualpipe_v, mirror
from dualpipe.generate.dualpipe_interleaved import dualpipe_interleaved
from dualpipe.generate.one_f_one_b import one_f_one_b
from dualpipe.generate.zero_bubble import v_half, v_min, zb_h1, zb_v
from dualpipe.ir import Op, Operation, Schedule, ScheduleError, to_json
from dualpipe.passes import forward_only
from dualpipe.registry import SCHEDULES, check_size
from dualpipe.simulate.bounds import lower_bound
from dualpipe.simulate.costs import Costs, uniform
from dualpipe.simulate.timing import peak_activations, simulate
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
    assert json.loads(to_json(build("dualpipe", 4, 8))) == json.loads((GOLDEN / "dualpipe_4_8.json").read_text())


@pytest.mark.parametrize("size", sorted(SHA256))
def test_dualpipe_is_the_published_order(size: str) -> None:
    num_ranks, num_micro_batches = map(int, size.split(","))
    assert sha256(build("dualpipe", num_ranks, num_micro_batches)) == SHA256[size]


def test_dualpipe_v_3_ranks_7_micro_batches_is_the_published_order() -> None:
    assert json.loads(to_json(dualpipe_v(3, 7))) == json.loads((GOLDEN / "dualpipe_v_3_7.json").read_text())


@pytest.mark.parametrize("num_ranks", range(1, 17))
def test_dualpipe_v_is_the_published_order(num_ranks: int) -> None:
    sizes = [size for size in SHA256_V if size.startswith(f"{num_ranks},")]
    assert len(sizes) >= 9
    for size in sizes:
        assert sha256(dualpipe_v(num_ranks, int(size.split(",")[1]))) == SHA256_V[size], size


def half_of_1f1b(num_ranks: int) -> float:
    """Returns the memory law of `v_half` in activations of model/P."""
    return num_ranks / 2 + 1


def third_of_1f1b(num_ranks: int) -> float:
    """Returns the memory law of `v_min` in activations of model/P."""
    return (2 * num_ranks // 3 + 3) / 2


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 5, 8, *exhaustive(6, 7, 9, 10)])
@pytest.mark.parametrize(
    ("kind", "most_alive"),
    [
        ("dualpipe", lambda num_ranks: num_ranks + 1),
        ("dualpipe_v", lambda num_ranks: num_ranks + 0.5),
        ("1f1b", float),
        ("zb_h1", float),
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
        schedule = build(kind, num_ranks, num_micro_batches)
        validate(schedule, memory_cap=most_alive(num_ranks))
        validate(forward_only(schedule), forward_only=True)
        if kind == "1f1b":
            expected = tuple(min(num_ranks - rank, num_micro_batches) for rank in range(num_ranks))
            assert peak_activations(schedule) == expected
        elif not is_double:
            kinds = {op.kind for groups in schedule.ranks for (op,) in groups}
            assert kinds == {Op.FORWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT}


@pytest.mark.parametrize("num_ranks", [3, 4, 5, 6, 9, *exhaustive(7, 8, *range(10, 17))])
@pytest.mark.parametrize(
    ("make", "overhead", "peak"),
    [
        (zb_h1, lambda num_ranks: num_ranks - 1, float),
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


@pytest.mark.parametrize("make", [zb_h1, zb_v])
def test_zero_bubble_with_one_micro_batch_takes_the_time_of_its_path(make: Callable[[int, int], Schedule]) -> None:
    for num_ranks in range(1, 9):
        schedule = make(num_ranks, 1)
        # All operations except the last weight gradients, which other ranks run at the same time.
        last_weight = 1.0 if num_ranks == 1 else num_ranks / schedule.num_stages
        assert simulate(schedule, EQUAL).makespan == 2 * num_ranks + last_weight


@pytest.mark.parametrize(("make", "of_two_ranks"), [(v_half, 1.0), (v_min, 1.5)])
def test_v_half_and_v_min_overhead_on_one_and_two_ranks(
    make: Callable[[int, int], Schedule], of_two_ranks: float
) -> None:
    for num_ranks, overhead in ((1, 0.0), (2, of_two_ranks)):
        for num_micro_batches in range(2, 12):
            simulation = simulate(make(num_ranks, num_micro_batches), EQUAL)
            assert simulation.makespan - 3 * num_micro_batches == overhead


def test_v_min_has_its_overhead_for_any_number_of_micro_batches() -> None:
    for num_ranks in range(2, 10):
        for num_micro_batches in range(1, num_ranks):
            makespan = simulate(v_min(num_ranks, num_micro_batches), EQUAL).makespan
            assert makespan - 3 * num_micro_batches == 2 * num_ranks - 2.5


def test_dualpipe_large_is_made_and_proven_within_seconds() -> None:
    # A bound on the order of growth: the work takes about half a second, quadratic work would take minutes.
    start = time.process_time()
    validate(build("dualpipe", 16, 512), memory_cap=17)
    assert time.process_time() - start < 5


@pytest.mark.parametrize("make", [zb_v, v_half])
def test_zero_bubble_large_is_made_and_proven_within_seconds(make: Callable[[int, int], Schedule]) -> None:
    start = time.process_time()
    validate(make(16, 512), memory_cap=16)
    assert time.process_time() - start < 5


def test_forward_only_keeps_the_order_of_forwards_and_nothing_else() -> None:
    schedule = build("dualpipe", 6, 14)
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
        ("dualpipe", 1, 8, r"^here: .*even number of pipeline ranks, has 1; nearest: 2, or schedule=dualpipe_split$"),
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
            7,
            r"^there: .*at least 8 micro-batches \(2 per rank\), has 7; nearest: 8, or schedule=dualpipe_split$",
        ),
        (
            "dualpipe",
            4,
            9,
            r"^there: .*even number of micro-batches.* has 9; nearest: 8 or 10, or schedule=dualpipe_split$",
        ),
        ("dualpipe_v", 3, 5, r"^there: .*at least 6 micro-batches .* has 5; nearest: 6, or schedule=dualpipe_split$"),
        ("dualpipe", 4, 0, r"^there: .*at least 1 micro-batch, has 0; nearest: 1$"),
        ("1f1b", 0, 1, r"^here: .*at least 1 rank, has 0; nearest: 1$"),
        ("1f1b", 1, 0, r"^there: .*at least 1 micro-batch, has 0; nearest: 1$"),
    ],
)
def test_rejected_sizes_name_key_rule_value_and_nearest(
    kind: str, num_ranks: int, num_micro_batches: int, message: str
) -> None:
    with pytest.raises(ScheduleError, match=message):
        check_size(kind, num_ranks, num_micro_batches, ranks_key="here", micro_batches_key="there")
    with pytest.raises(ScheduleError, match=r"^num_(ranks|micro_batches): "):
        build(kind, num_ranks, num_micro_batches)


def test_mirror_of_one_rank_gives_each_direction_to_both() -> None:
    groups = tuple(
        (Operation(kind, 0, stage, 0),)
        for kind, stage in [(Op.FORWARD, 0), (Op.FORWARD, 1), (Op.BACKWARD, 1), (Op.BACKWARD, 0)]
    )
    folded = Schedule(kind="v", num_ranks=1, num_micro_batches=1, placement=((0, 0),), ranks=(groups,))
    unfolded = mirror(folded)
    assert unfolded.placement == ((0, 1), (1, 0))
    assert (unfolded.kind, unfolded.num_ranks, unfolded.num_micro_batches) == ("v", 2, 2)
    printed = [" ".join("+".join(map(str, group)) for group in groups) for groups in unfolded.ranks]
    assert printed == ["F0.0 F1.0' B1.0' B0.0", "F0.0' F1.0 B1.0 B0.0'"]


@pytest.mark.parametrize("num_ranks", range(1, 6))
def test_mirror_of_dualpipe_v_is_dualpipe(num_ranks: int) -> None:
    for num_micro_batches in range(2 * num_ranks, 2 * num_ranks + 4):
        unfolded = mirror(dualpipe_v(num_ranks, num_micro_batches))
        assert replace(unfolded, kind="dualpipe") == dualpipe(2 * num_ranks, 2 * num_micro_batches)


@pytest.mark.parametrize("num_ranks", range(1, 7))
def test_mirror_of_zb_v_is_valid_for_every_size(num_ranks: int) -> None:
    for num_micro_batches in range(1, 2 * num_ranks + 3):
        validate(mirror(zb_v(num_ranks, num_micro_batches)), memory_cap=2 * num_ranks)


@pytest.mark.parametrize("num_ranks", range(1, 5))
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


@pytest.mark.parametrize(("num_ranks", "chunks", "most"), [(8, 2, 1.5), (8, 4, 0.75), (16, 4, 1.75), (6, 3, 5 / 6)])
def test_interleaved_idles_by_its_formula_without_exchange(num_ranks: int, chunks: int, most: float) -> None:
    assert overhead(num_ranks, 4 * num_ranks, equal_times(0), chunks) <= most + 1e-9


@pytest.mark.parametrize(("exchange", "most"), [(0.5, 6.0), *exhaustive((1.0, 12.0), (1.5, 30.0))])
def test_interleaved_hides_exchange(exchange: float, most: float) -> None:
    assert overhead(8, 32, equal_times(exchange), 4) <= most


@pytest.mark.long
def test_interleaved_hides_latency() -> None:
    """Orders that send early at both ends of the step lose 15; with equal preferences in all parts 17.2."""
    costs = Costs(forward=1, backward_input=1, backward_weight=1, exchange=1, latency=0.1)
    assert min(overhead(8, 32, costs, chunks) for chunks in (2, 3)) <= 15
