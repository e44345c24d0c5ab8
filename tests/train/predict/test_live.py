"""Predicted memory against the storages that are alive in a step: 6 shapes, 3 precisions, one rank and several."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, combinations, product
from pathlib import Path
from statistics import mean
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from comm.balance.rows import Ints, RowPlan
from comm.config import AllToAllDispatchConfig, ParallelismConfig, TwoHopDispatchConfig
from dualpipe.generate.one_f_one_b import one_f_one_b
from dualpipe.runtime.program import Action
from model.config import LAYER, RECOMPUTED, MlaConfig, Recomputed
from tests.dualpipe.random_schedules import bidirectional, looped, offloaded, random_schedule, straight
from tests.ranks import run_ranks
from tests.tiny import BATCH, MODEL, tiny_config, write_text
from tests.train.predict.live import Compared, compare_rank
from train.config import Fp8PrecisionConfig, Precision, PrecisionConfig, TrainConfig
from train.predict.memory import planning_sizes

BASE = replace(
    MODEL,
    num_layers=2,
    hidden_size=128,
    dense_intermediate_size=320,
    num_heads=4,
    q_lora_rank=64,
    kv_lora_rank=32,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    expert_intermediate_size=96,
)
SHAPES: dict[str, tuple[MlaConfig, tuple[Recomputed, ...]]] = {
    "all features": (BASE, RECOMPUTED),
    "no query rank": (replace(BASE, q_lora_rank=None, num_shared_experts=2), RECOMPUTED),
    "no shared experts": (replace(BASE, num_shared_experts=0, num_dense_layers=0, mtp_depth=0), RECOMPUTED),
    "two MTP modules": (replace(BASE, mtp_depth=2, mtp_hidden="pre_norm"), RECOMPUTED),
    "dense, wide values": (replace(BASE, num_dense_layers=2, mtp_depth=0, v_head_dim=64), RECOMPUTED),
    "keeps all": (BASE, ()),
}
PRECISIONS: dict[str, Precision] = {
    "float32": PrecisionConfig(kind="float32"),
    "bf16": PrecisionConfig(kind="bf16"),
    "fp8": Fp8PrecisionConfig(kind="fp8", scales="float32"),
}
TOLERANCE = 0.02


def make_config(
    folder: Path, model: MlaConfig, recompute: tuple[Recomputed, ...], precision: Precision, **changes: Any
) -> TrainConfig:
    is_fp8, is_full = precision.kind == "fp8", precision.kind == "float32"
    config = tiny_config(folder, model=replace(model, max_position_tokens=256), precision=precision)
    batch = replace(BATCH, sequence_length_tokens=64, global_sequences=6, micro_sequences=2)
    optim = replace(
        config.optim, sharding="replicated" if is_full else "zero1", moments="bf16" if is_fp8 else "float32"
    )
    recompute = RECOMPUTED if is_fp8 and LAYER not in recompute else recompute
    schedule = replace(config.schedule, kind="dualpipe_split")
    given = replace(config, batch=batch, optim=optim, recompute=recompute, schedule=schedule)
    return replace(given, **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("memory")
    write_text(made)
    return made


def settled(compared: Compared, values: list[int]) -> list[int]:
    """Returns the steps after which no exchange is running."""
    return [value for value, is_settled in zip(values, compared.is_settled, strict=True) if is_settled]


def check(compared: Compared, name: str, tolerance: float = TOLERANCE) -> None:
    """Compares the static bytes, and the live bytes after every step of the program."""
    assert compared.predicted_static == pytest.approx(compared.static, rel=tolerance), f"{name}: static"
    measured, predicted = settled(compared, compared.after), settled(compared, compared.predicted_after)
    assert len(measured) > len(compared.after) // 3, name
    for index, (alive, expected) in enumerate(zip(measured, predicted, strict=True)):
        room = tolerance * max(measured)
        assert abs(expected - alive) <= room, f"{name}: settled step {index}: {alive} bytes, predicted {expected}"
    assert max(predicted) == pytest.approx(max(measured), rel=tolerance), f"{name}: peak"


def check_alone(compared: Compared, name: str) -> None:
    """Compares a rank that has no messages, of which nothing may stay after the last weight gradient."""
    check(compared, name)
    assert compared.after[-1] == compared.predicted_after[-1] == 0, f"{name}: kept after the last weight gradient"


EVERY_PAIR = tuple(product(SHAPES, PRECISIONS))
FEW_PAIRS = (("all features", "float32"), ("two MTP modules", "bf16"), ("no shared experts", "fp8"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "names", [pytest.param(FEW_PAIRS, id="few"), pytest.param(EVERY_PAIR, id="every", marks=pytest.mark.exhaustive)]
)
def test_one_rank_keeps_what_is_predicted_in_every_shape_and_precision(
    folder: Path, names: tuple[tuple[str, str], ...]
) -> None:
    jobs = [(make_config(folder, *SHAPES[shape], PRECISIONS[precision]), None) for shape, precision in names]
    (results,) = run_ranks(1, compare_rank, jobs, False)
    for name, compared in zip(names, results, strict=True):
        check_alone(compared, " ".join(name))
        assert max(compared.pending) > 0


EVERY_SUBSET = (
    frozenset[Recomputed]([LAYER]),
    *(frozenset(some) for some in chain.from_iterable(combinations(RECOMPUTED, size) for size in range(4))),
)
EVERY_CASE = tuple(product(SHAPES, PRECISIONS, EVERY_SUBSET))
SOME_CASES = tuple((*pair, subset) for pair, subset in zip(EVERY_PAIR[::2], EVERY_SUBSET, strict=True))
"""Every subset once, every shape once or twice, and every precision three times."""


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(SOME_CASES, id="some", marks=pytest.mark.slow),
        pytest.param(EVERY_CASE, id="every", marks=pytest.mark.exhaustive),
    ],
)
def test_activations_of_one_micro_batch_are_exact(
    folder: Path, cases: tuple[tuple[str, str, frozenset[Recomputed]], ...]
) -> None:
    """After F to the byte, between I and W within 1 %; single numbers apart, which are at most 8 bytes each."""
    jobs = []
    for shape, precision, recomputed in cases:
        kept = tuple(kind for kind in (*RECOMPUTED, LAYER) if kind in recomputed)
        config = make_config(folder, SHAPES[shape][0], kept, PRECISIONS[precision])
        config = replace(config, batch=replace(config.batch, global_sequences=config.batch.micro_sequences))
        jobs.append((config, random_schedule(straight(1), 1, 0, split_share=1.0)))
    (results,) = run_ranks(1, compare_rank, jobs, False, timeout_seconds=600.0)
    for case, (job, _), compared in zip(cases, jobs, results, strict=True):
        first_backward = compared.actions.index(Action.BACKWARD)
        alive, predicted = compared.after[first_backward - 1], compared.predicted_after[first_backward - 1]
        # The account takes every token to have a target.
        predicted -= compared.num_skipped * job.model.hidden_size * planning_sizes(job).value_bytes
        assert alive == predicted, f"{case}: after F {alive} bytes, predicted {predicted}"
        first_weight = compared.actions.index(Action.WEIGHT)
        alive, predicted = compared.after[first_weight - 1], compared.predicted_after[first_weight - 1]
        assert abs(alive - predicted) <= 0.01 * alive, f"{case}: between I and W {alive} bytes, predicted {predicted}"


@pytest.mark.slow
def test_recomputed_layers_keep_what_is_predicted(folder: Path) -> None:
    """Live bytes after every step, for F, I and W, and inside operations in float32."""
    shapes = ("all features", "no query rank", "no shared experts")
    configs = [
        make_config(folder, SHAPES[shape][0], (LAYER,), precision)
        for shape, precision in zip(shapes, PRECISIONS.values(), strict=True)
    ]
    (results,) = run_ranks(1, compare_rank, [(config, None) for config in configs], True)
    for name, compared in zip(PRECISIONS, results, strict=True):
        check_alone(compared, name)
        assert max(compared.pending) > 0
    assert max(results[0].predicted_peaks) == pytest.approx(max(results[0].peaks), rel=TOLERANCE)


@pytest.mark.slow
def test_offloaded_activations_are_not_kept(folder: Path) -> None:
    """Every micro-batch leaves the device and returns at random places of the schedule."""
    schedule = random_schedule(straight(1), 6, 0, split_share=1.0)
    moved = offloaded(schedule, 1, 1.0)
    job = make_config(folder, *SHAPES["all features"], PRECISIONS["fp8"])
    job = replace(job, batch=replace(job.batch, global_sequences=12))
    ((stays, moves),) = run_ranks(1, compare_rank, [(job, order) for order in (schedule, moved)], False)
    check_alone(moves, "offloaded")
    assert max(moves.after) < 0.95 * max(stays.after)


@pytest.mark.slow
def test_ranks_of_a_mirrored_pipeline_keep_what_is_predicted(folder: Path) -> None:
    """Two pipeline ranks, both directions, experts over two data ranks, rows exchanged in both ways."""
    mesh = ParallelismConfig(pipeline=2, data=2, expert=2)
    two_hop = TwoHopDispatchConfig(
        kind="two_hop", payload="full", max_nodes=4, node_cap="verify", chunks=2, partial_sums="rows"
    )
    # Not in FP8: it fills every expert's rows up to 128, which uneven routing of few tokens decides.
    first = make_config(folder, *SHAPES["all features"], PRECISIONS["float32"], parallelism=mesh)
    others = make_config(folder, *SHAPES["keeps all"], PRECISIONS["bf16"], parallelism=mesh, dispatch=two_hop)
    jobs = [(replace(job, batch=replace(job.batch, global_sequences=16)), None) for job in (first, others)]
    results = run_ranks(4, compare_rank, jobs, False)
    for place in range(2):
        for index, both in enumerate(zip(results[2 * place], results[2 * place + 1], strict=True)):
            # Messages that have left may still be there.
            check(together(*both), f"pipeline rank {place}, job {index}", 0.05)


def copy_all(counts_RE: Ints, nodes: Sequence[int], **options: Any) -> RowPlan:
    """Copies every expert of two ranks to the other one, which takes half of its rows."""
    experts_RS = [list(range(4, 8)), list(range(4))]
    return RowPlan(experts_RS, np.stack([counts_RE[:, experts].T // 2 for experts in experts_RS]), [], 0)


def compare_copies(rank: int, world_size: int, jobs: list[tuple[TrainConfig, None]]) -> list[Compared]:
    with patch("comm.dispatch.build.plan_rows", copy_all):
        return compare_rank(rank, world_size, [*jobs], True)


@pytest.mark.slow
def test_ranks_with_copies_of_experts_keep_what_is_predicted(folder: Path) -> None:
    """Every slot is used in every layer, forward and backward; both ranks send all of their experts."""
    wide = replace(BASE, expert_intermediate_size=192)
    jobs = []
    for precision, recompute in (("float32", RECOMPUTED), ("bf16", (LAYER,))):
        config = make_config(folder, wide, recompute, PRECISIONS[precision])
        config = replace(
            config,
            parallelism=ParallelismConfig(pipeline=1, data=2, expert=2),
            dispatch=AllToAllDispatchConfig(
                kind="all_to_all", payload="full", max_nodes=4, node_cap="verify", balance="node", balance_slots=4
            ),
            schedule=replace(config.schedule, pairing="sequential"),
            batch=replace(config.batch, global_sequences=8),
        )
        jobs.append((config, None))
    for index, both in enumerate(zip(*run_ranks(2, compare_copies, jobs), strict=True)):
        # Messages that have left may still be there.
        check(together(*both), f"job {index}", 0.05)
        # Weights in the slots, and gradients that have arrived.
        bytes_of_copies = 4 * 3 * BASE.hidden_size * 192 * (planning_sizes(jobs[index][0]).value_bytes + 4)
        for rank, compared in enumerate(both):
            predicted = max(compared.predicted_peaks)
            assert bytes_of_copies > 0.1 * predicted
            assert predicted == pytest.approx(max(compared.peaks), rel=0.05), f"job {index}, rank {rank}"


@pytest.mark.long
def test_ranks_that_share_sequences_keep_what_is_predicted(folder: Path) -> None:
    """A mirrored pipeline of two ranks, each of them twice, with half of every sequence."""
    mesh = ParallelismConfig(pipeline=2, data=1, expert=1, context=2)
    jobs = [
        (make_config(folder, *shape, PRECISIONS[precision], parallelism=mesh), None)
        for shape, precision in (
            (SHAPES["no query rank"], "float32"),
            (SHAPES["keeps all"], "bf16"),
            ((BASE, (LAYER,)), "fp8"),
        )
    ]
    config = jobs[0][0]
    slices = replace(config.schedule, kind="dualpipe_split", slices=2, link_depth=2)
    jobs.append((replace(config, schedule=slices), None))
    for rank, compared in enumerate(run_ranks(4, compare_rank, jobs, False)):
        for (job, _), each in zip(jobs, compared, strict=True):
            # Messages that have left may still be there.
            check(each, f"rank {rank}, {job.precision.kind}", 0.05)


@pytest.mark.slow
def test_ranks_with_chunks_and_a_shared_embedding_keep_what_is_predicted(folder: Path) -> None:
    """First and last stage on different ranks, and both directions, with two chunks."""
    model = replace(BASE, num_layers=4)
    mesh = ParallelismConfig(pipeline=2, data=1, expert=1)
    jobs = [
        (
            make_config(folder, model, RECOMPUTED, PRECISIONS[precision], parallelism=mesh),
            random_schedule(placed, 3, 0, link_depth=depth),
        )
        for precision, placed, depth in (("float32", looped(2, 2), 1), ("bf16", bidirectional(2, 2), 4))
    ]
    results = run_ranks(2, compare_rank, jobs, False)
    for rank, compared in enumerate(results):
        for index, each in enumerate(compared):
            # Messages that have left may still be there.
            check(each, f"rank {rank}, job {index}", 0.05)


def together(one: Compared, other: Compared) -> Compared:
    """Ranks that share experts: routing is uneven, but what one receives more, the other receives less."""
    return Compared(
        static=one.static + other.static,
        predicted_static=one.predicted_static + other.predicted_static,
        after=[sum(pair) for pair in zip(one.after, other.after, strict=True)],
        predicted_after=[sum(pair) for pair in zip(one.predicted_after, other.predicted_after, strict=True)],
        peaks=one.peaks,
        predicted_peaks=one.predicted_peaks,
        pending=one.pending,
        is_settled=one.is_settled,
        actions=one.actions,
        num_skipped=one.num_skipped + other.num_skipped,
    )


def test_peaks_inside_operations_are_those_of_the_reference_kernels(folder: Path) -> None:
    """Only float32, in which a CPU computes like a GPU. A CPU emulates FP8 and bf16 in wider types."""
    jobs = [(make_config(folder, *SHAPES["all features"], PRECISIONS["float32"]), None)]
    ((compared,),) = run_ranks(1, compare_rank, jobs, True)
    assert max(compared.predicted_peaks) == pytest.approx(max(compared.peaks), rel=TOLERANCE)


@pytest.mark.long
def test_peaks_of_ranks_that_share_sequences_are_those_of_the_reference_kernels(folder: Path) -> None:
    mesh = ParallelismConfig(pipeline=1, data=1, expert=1, context=2)
    shapes = [SHAPES[name] for name in ("all features", "keeps all")]
    jobs = [(make_config(folder, *shape, PRECISIONS["float32"], parallelism=mesh), None) for shape in shapes]
    for compared in run_ranks(2, compare_rank, jobs, True):
        for each in compared:
            assert max(each.predicted_peaks) == pytest.approx(max(each.peaks), rel=TOLERANCE)


@pytest.mark.slow
def test_slices_keep_what_is_predicted(folder: Path) -> None:
    """Live bytes after every step of forwards and backwards of two micro-batches in four slices each."""
    configs = [
        make_config(folder, *SHAPES["all features"], PRECISIONS["float32"]),
        make_config(folder, BASE, (LAYER,), PRECISIONS["bf16"]),
    ]
    jobs = []
    for config in configs:
        batch = replace(config.batch, global_sequences=4)
        schedule = replace(config.schedule, kind="sliced_1f1b", slices=4)
        jobs.append((replace(config, batch=batch, schedule=schedule), one_f_one_b(1, 8, 4)))
    # Rows to which later slices attend stay on the device.
    jobs.append((jobs[0][0], offloaded(jobs[0][1], 1, 1.0)))
    (results,) = run_ranks(1, compare_rank, jobs, False)
    for (config, _), compared in zip(jobs, results, strict=True):
        check_alone(compared, config.precision.kind)
    assert mean(results[2].after) < 0.9 * mean(results[0].after)
