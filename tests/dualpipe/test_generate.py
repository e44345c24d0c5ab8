"""Generators make the published orders, which are valid for every accepted size."""

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dualpipe.build import build
from dualpipe.generate.dualpipe import dualpipe_v
from dualpipe.generate.zero_bubble import v_half, v_min, zb_h1, zb_v
from dualpipe.ir import Op, Schedule, ScheduleError, to_json
from dualpipe.passes import forward_only
from dualpipe.registry import SCHEDULES, check_size
from dualpipe.simulate.costs import Costs
from dualpipe.simulate.simulate import peak_activations, simulate
from dualpipe.validate import validate

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


@pytest.mark.parametrize("num_ranks", range(1, 11))
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


@pytest.mark.parametrize("num_ranks", range(3, 17))
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
    make: Callable[[int, int], Schedule],
    overhead: Callable[[int], float],
    peak: Callable[[int], float],
    num_ranks: int,
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
