"""The layers of each stage: by cost, even, listed or balanced, within limits; and the number of chunks."""

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from base.decode import decode, encode
from base.refusal import ConfigError
from comm.config import Cut, ParallelismConfig
from dualpipe.builder import build_schedule
from dualpipe.costs import Costs
from dualpipe.ir import Placement, mirrored_placement, straight_placement, v_placement
from dualpipe.registry import SCHEDULES
from dualpipe.simulation import simulate
from launch.config.run import compose_run
from model.config import CutError, cut_layers
from tests.tiny import MODEL, tiny_config
from train.config import TrainConfig
from train.predict.cut import CutLimits, balanced_cut, run_cut, run_placement, with_cut
from train.predict.fit import fitted_cut
from train.predict.layer_times import (
    LaneWork,
    ModelWork,
    nominal_times,
    pace,
    runs_in_lockstep,
    stage_costs,
    stage_works,
    times_of_ranks,
)
from train.predict.memory import predict_memory
from train.predict.timing import nominal_costs, with_chunks

V3 = (
    "model=v3_671b",
    "cluster=h800",
    "parallelism=v3_2048_ranks",
    "precision=fp8",
    "batch.micro_sequences=1",
    "batch.sequence_length_tokens=4096",
)


def config_of(folder: Path, pipeline: int, cut: Cut, kind: str = "dualpipe_split", layers: int = 8) -> TrainConfig:
    config = tiny_config(
        folder,
        parallelism=ParallelismConfig(pipeline=pipeline, data=2, expert=2, cut=cut),
        model=replace(MODEL, num_layers=layers),
    )
    return replace(config, schedule=replace(config.schedule, kind=kind, pairing="overlapped"))


def sizes_of(config: TrainConfig) -> list[int]:
    return [len(layers) for layers in run_cut(config, run_placement(config, config.schedule.kind))]


def test_cut_is_written_as_a_word_or_a_list() -> None:
    mesh = {"pipeline": 2, "data": 1, "expert": 1}
    for plain in ("auto", "even", [3, 0]):
        decoded = decode(ParallelismConfig, {**mesh, "cut": plain})
        assert encode(decoded)["cut"] == plain
    for wrong in ("automatic", [], [1, -1], [1, 2.0], [True, 3], 4, None):
        with pytest.raises(ConfigError, match=r"^cut: must be auto, even, or a list .*nearest valid: auto$"):
            decode(ParallelismConfig, {**mesh, "cut": wrong})


def test_even_cut_counts_layers_and_a_list_is_used_as_it_is(tmp_path: Path) -> None:
    assert sizes_of(config_of(tmp_path, 4, Cut("even"))) == [len(layers) for layers in cut_layers(8, 4, 1)]
    listed = config_of(tmp_path, 4, Cut("listed", (0, 5, 3, 0)))
    assert run_cut(listed, run_placement(listed, "dualpipe_split")) == (range(0), range(5), range(5, 8), range(8, 8))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (
            (4, 4),
            "parallelism.cut: must list the layers of 4 stages, because schedule=dualpipe_split has so many with "
            "parallelism.pipeline=4, lists 2, is [4,4]; nearest valid: [3,2,2,1], or auto",
        ),
        (
            (2, 2, 2, 3),
            "parallelism.cut: must add up to model.num_layers=8, adds up to 9, is [2,2,2,3]; "
            "nearest valid: [2,2,2,2], or auto",
        ),
        (
            (4, 0, 4, 0),
            "parallelism.cut: every stage except the first and the last must have at least one layer, stage 1 has "
            "none, is [4,0,4,0]; nearest valid: [3,1,4,0], or auto",
        ),
    ],
)
def test_wrong_list_is_rejected_with_the_nearest_valid_one(
    tmp_path: Path, layers: tuple[int, ...], message: str
) -> None:
    config = config_of(tmp_path, 4, Cut("listed", layers))
    with pytest.raises(CutError) as caught:
        sizes_of(config)
    assert str(caught.value) == message
    nearest = message.partition("nearest valid: [")[2].partition("]")[0]
    sizes_of(config_of(tmp_path, 4, Cut("listed", tuple(map(int, nearest.split(","))))))


def test_list_determines_the_chunks_of_a_rank(tmp_path: Path) -> None:
    for kind in ("zb_v", "dualpipe_v"):
        assert sizes_of(config_of(tmp_path, 2, Cut("listed", (3, 2, 2, 1)), kind)) == [3, 2, 2, 1]
    with pytest.raises(ValueError, match=r"stages per rank"):
        sizes_of(config_of(tmp_path, 2, Cut("listed", (4, 4)), "zb_v"))


@pytest.mark.parametrize("kind", SCHEDULES.names())
def test_costs_of_all_stages_add_up_to_the_configured_ones(tmp_path: Path, kind: str) -> None:
    costs = Costs(forward=1.0, backward_input=1.3, backward_weight=0.7, exchange=0.5, latency=0.1)
    for cut in (Cut("auto"), Cut("even")):
        config = replace(config_of(tmp_path, 2, cut, kind), costs=costs)
        model = stage_costs(nominal_times(config), config, run_cut(config, run_placement(config, kind)))
        for name, whole in (("forward", 1.0), ("backward_input", 1.3), ("backward_weight", 0.7), ("activation", 1.0)):
            assert sum(getattr(stage, name) for stage in model.stages) == pytest.approx(2 * whole), name
        assert sum(stage.forward_exchange for stage in model.stages) == pytest.approx(2 * 0.5)
        assert len(nominal_costs(config, kind).stages) == len(model.stages)
        assert model.latency == 0.1


def test_nearly_equal_stages_count_as_equal_in_nominal_costs() -> None:
    config = compose_run(V3)
    assert len(set(nominal_costs(config, "dualpipe_split").stages)) == 1
    even = replace(config, parallelism=replace(config.parallelism, cut=Cut("even")))
    stages = nominal_costs(even, "dualpipe_split").stages
    assert stages[15].forward > 1.2 * stages[1].forward


def test_deepseek_v3_is_cut_by_accounts_as_by_the_public_trace() -> None:
    """Layers run in FP8 and heads do not; the accounts put one layer next to MTP and the heads."""
    config = compose_run(V3)
    assert sizes_of(config) == [4] * 15 + [1]
    times = nominal_times(config)
    # The trace has 31.1 ms for a MoE layer, 28.1 for a dense one, 35 for each head and 70 for MTP with its head.
    moe = times.moe.forward
    for part, milliseconds in ((times.dense, 28.1), (times.head, 35.0), (times.mtp, 70.0)):
        assert part.forward / moe == pytest.approx(milliseconds / 31.1, rel=0.12)


def test_cut_gives_way_to_memory_if_another_one_fits() -> None:
    """The two ranks of the embedding and the heads need most memory. Less memory moves a layer away from them."""
    overrides = ("model=quickstart", "parallelism=four_ranks", "parallelism.pipeline=4", "parallelism.data=1")
    config = compose_run([*overrides, "parallelism.expert=1", "batch.micro_sequences=1"])
    free = fitted_cut(config, "dualpipe_split")
    job = predict_memory(with_cut(config, free))
    assert free == run_cut(config, run_placement(config, "dualpipe_split"))
    even = predict_memory(with_cut(config, cut_layers(config.model.num_layers, 4, config.model.mtp_depth)))
    least = min(job.worst.total, even.worst.total)
    for room in (job.worst.total, least, least // 2):
        limited = replace(config, cluster=replace(config.cluster, memory_bytes=room))
        found = fitted_cut(limited, "dualpipe_split")
        assert (predict_memory(with_cut(limited, found)).worst.total <= room) is (room >= least)
        if room < least:
            assert found == free


TOLERANCE = 1.02

LOCKSTEP_TOLERANCE = 1.04

"""With several chunks two layers may have to move at once, which is not tried."""

NONE = LaneWork()

PLACEMENTS: tuple[Placement, ...] = (
    *(mirrored_placement(num_ranks) for num_ranks in range(1, 6)),
    mirrored_placement(2, 2),
    mirrored_placement(3, 2),
    v_placement(2),
    v_placement(3),
    straight_placement(4),
    straight_placement(2, 2),
)

BALANCED_V3 = ModelWork(
    num_dense=3,
    num_moe=58,
    embedding=LaneWork(),
    dense=LaneWork(28.1),
    moe=LaneWork(31.1, 20.1),
    heads=LaneWork(105.0, 20.1),
)

"""Milliseconds of forward and backward of 4,096 tokens in each part, from github.com/deepseek-ai/profile-data."""


def all_cuts(num_layers: int, num_stages: int) -> Iterator[tuple[int, ...]]:
    """Yields every cut whose stages have a layer; the last of several may have none."""
    for sizes in product(range(1, num_layers + 1), repeat=num_stages - 1):
        last = num_layers - sum(sizes)
        if last >= (num_stages == 1):
            yield (*sizes, last)


def random_model(draw: random.Random, num_stages: int) -> ModelWork:
    num_layers, exchange = num_stages + draw.randint(0, 5), draw.choice([0.0, 0.0, 1.0, 1.5])
    num_dense = draw.randint(0, min(num_layers, 4))
    return ModelWork(
        num_dense=num_dense,
        num_moe=num_layers - num_dense,
        embedding=LaneWork(draw.choice([0.0, 0.3])),
        dense=LaneWork(draw.uniform(0.5, 1.2)),
        moe=LaneWork(1.0, exchange),
        heads=LaneWork(draw.uniform(0.0, 4.0), draw.choice([0.0, exchange])),
    )


@pytest.mark.slow
@pytest.mark.parametrize("placement", PLACEMENTS, ids=lambda placement: f"{placement[0]}x{len(placement)}")
def test_balanced_cut_is_within_tolerance_of_the_best_of_all_cuts(placement: Placement) -> None:
    draw, tolerance = random.Random(0), LOCKSTEP_TOLERANCE if runs_in_lockstep(placement) else TOLERANCE
    for _ in range(12):
        model = random_model(draw, len(placement[0]))
        cuts = list(all_cuts(model.num_layers, len(placement[0])))
        found = balanced_cut(model, placement)
        assert found in cuts, (model, found)
        paces = {cut: pace(stage_works(cut, model), placement) for cut in cuts}
        least = min(paces.values())
        assert paces[found] <= tolerance * least + 1e-9, (model, found, least)
        # Of the cuts within the tolerance, it has nearly the fastest pace and smallest largest stage.
        values = {
            cut: paces[cut] / mean(times_of_ranks(stage_works(cut, model), placement)) + 0.1 * largest_stage(cut, model)
            for cut in cuts
            if paces[cut] <= tolerance * least
        }
        assert values[found] <= min(values.values()) + 0.01, (model, found, min(values, key=values.__getitem__))


def mean(times: Sequence[float]) -> float:
    return sum(times) / len(times)


def largest_stage(cut: tuple[int, ...], model: ModelWork) -> float:
    times = tuple(work.time for work in stage_works(cut, model))
    return max(times) / mean(times)


def test_work_of_a_rank_is_that_of_its_stages_in_both_directions() -> None:
    model = ModelWork(
        num_dense=1,
        num_moe=4,
        embedding=LaneWork(100),
        dense=LaneWork(1),
        moe=LaneWork(10, 3),
        heads=LaneWork(1000, 50),
    )
    # Stage 0: embedding, dense, MoE. Stage 1: two MoE. Stage 2: MoE and heads. The middle rank holds stage 1 twice.
    assert [work.compute for work in stage_works((2, 2, 1), model)] == [111, 20, 1010]
    assert times_of_ranks(stage_works((2, 2, 1), model), mirrored_placement(3)) == (1121, 40, 1121)
    assert times_of_ranks(stage_works((2, 2, 1), model), straight_placement(3)) == (111, 20, 1010)
    exchanging = ModelWork(
        num_dense=0, num_moe=2, embedding=LaneWork(), dense=LaneWork(), moe=LaneWork(1, 3), heads=LaneWork(4)
    )
    assert times_of_ranks(stage_works((1, 1), exchanging), straight_placement(2)) == (3, 5)


@pytest.mark.parametrize(
    ("placement", "most"),
    [
        (mirrored_placement(16), 1.0095),
        (mirrored_placement(16, 2), 1.034),
        (mirrored_placement(16, 3), 1.034),
        (v_placement(16), 1.069),
        (straight_placement(16, 3), 1.343),
    ],
    ids=["mirrored", "mirrored, 2 chunks", "mirrored, 3 chunks", "V", "straight, 3 chunks"],
)
def test_cut_of_deepseek_v3_by_the_public_trace(placement: Placement, most: float) -> None:
    """The even cut of mirrored stages reaches 1.134. With 48 stages, ranks of the heads hold too many layers."""
    started = time.process_time()
    found = balanced_cut(BALANCED_V3, placement)
    assert time.process_time() - started < 1
    assert found is not None
    assert sum(found) == 61
    times = times_of_ranks(stage_works(found, BALANCED_V3), placement)
    assert max(times) / mean(times) <= most
    even = (*[4] * 14, 3, 2)
    assert max(times_of_ranks(stage_works(even, BALANCED_V3), mirrored_placement(16))) / 249.1 > 1.13


def test_pace_is_slower_if_heavy_stages_of_a_rank_meet() -> None:
    """Rank 0 has 6 in both. F and I of its stages 0 and 7 meet, and those of its stages 3 and 4."""
    placement = mirrored_placement(4, 2)
    apart = [LaneWork(work) for work in (1.0, 1.5, 1.5, 2.0, 1.0, 1.5, 1.5, 2.0)]
    meeting = [LaneWork(work) for work in (2.0, 1.5, 1.5, 1.0, 1.0, 1.5, 1.5, 2.0)]
    assert times_of_ranks(apart, placement) == times_of_ranks(meeting, placement) == (6, 6, 6, 6)
    assert pace(apart, placement) == pytest.approx(6)
    assert pace(meeting, placement) > 1.1 * 6


def test_cut_of_two_chunks_spreads_the_heads_of_deepseek_v3() -> None:
    """The rank of the heads has one layer less in the stage that runs with them, not in another one."""
    placement = mirrored_placement(16, 2)
    found = balanced_cut(BALANCED_V3, placement)
    assert found == (1, *[2] * 30, 0)
    works = stage_works(found, BALANCED_V3)
    assert pace(works, placement) <= 1.034 * mean(times_of_ranks(works, placement))
    ranks_only = (3, *[2] * 14, 1, 1, *[2] * 14, 0)
    assert max(times_of_ranks(stage_works(ranks_only, BALANCED_V3), placement)) < max(times_of_ranks(works, placement))
    assert pace(stage_works(ranks_only, BALANCED_V3), placement) > 1.2 * pace(works, placement)


def test_limits_of_memory_are_kept_or_no_cut_is_found() -> None:
    placement = mirrored_placement(4)
    model = ModelWork(
        num_dense=0, num_moe=16, embedding=LaneWork(), dense=LaneWork(), moe=LaneWork(1), heads=LaneWork(2)
    )
    assert balanced_cut(model, placement) == (4, 4, 5, 3)
    limited = balanced_cut(model, placement, CutLimits(layers={1: 7}))
    assert limited is not None
    assert limited[1] + limited[2] == 7
    late = balanced_cut(model, placement, CutLimits(late=frozenset({0, 1})))
    assert late is not None
    assert late[0] == late[1] == 1
    assert balanced_cut(model, placement, CutLimits(layers={0: 7, 1: 8})) is None


def make_config(folder: Path, kind: str, num_layers: int, chunks: int | None = None) -> TrainConfig:
    mesh = replace(tiny_config(folder).parallelism, pipeline=4, data=2, expert=2)
    assert isinstance(mesh, ParallelismConfig)
    config = tiny_config(folder, parallelism=mesh)
    batch = replace(config.batch, global_sequences=2 * 8 * config.batch.micro_sequences)
    model = replace(config.model, num_layers=num_layers)
    schedule = replace(config.schedule, kind=kind, chunks=chunks, pairing="overlapped")
    return replace(config, model=model, batch=batch, schedule=schedule)


@pytest.mark.slow
def test_chunks_are_those_of_the_fastest_schedule(tmp_path: Path) -> None:
    config = make_config(tmp_path, "dualpipe_interleaved", 16)
    chosen = with_chunks(config).schedule.chunks
    makespans = {}
    for chunks in (1, 2, 3, 4):
        costs = nominal_costs(replace(config, schedule=replace(config.schedule, chunks=chunks)), config.schedule.kind)
        makespans[chunks] = simulate(
            build_schedule(config.schedule.kind, 4, config.num_micro_batches, costs), costs
        ).makespan
    assert chosen is not None
    assert makespans[chosen] <= min(makespans.values()) * 1.04
    assert makespans[chosen] < makespans[1]


def test_chunks_that_are_configured_or_determined_stay(tmp_path: Path) -> None:
    for kind, layers, chunks in (("dualpipe_interleaved", 16, 3), ("auto", 16, None), ("zb_v", 16, None)):
        config = make_config(tmp_path, kind, layers, chunks)
        assert with_chunks(config) == config
    few = make_config(tmp_path, "dualpipe_interleaved", 7)
    assert with_chunks(few) == few, "4 ranks with 7 layers have no second chunk"
