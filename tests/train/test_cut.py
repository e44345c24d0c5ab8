"""The layers of each stage of a run: by cost, even or listed, and within the memory."""

from dataclasses import replace
from pathlib import Path

import pytest

from comm.config import Cut, ParallelismConfig
from dualpipe.registry import SCHEDULES
from dualpipe.simulate.costs import Costs
from launch.config.run_config import compose_run
from model.config import CutError, cut_layers
from model.size import count_parameters, count_work, training_flops_per_token
from tests.tiny import MODEL, tiny_config
from train.config import TrainConfig
from train.config.decode import decode, encode
from train.config.errors import ConfigError
from train.memory.fitted_cut import fitted_cut
from train.memory.predict import predict_memory
from train.schedule.cut import run_cut, run_placement, with_cut
from train.schedule.layer_times import nominal_times, stage_costs
from train.schedule.nominal import nominal_costs

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


def test_work_is_proportional_to_floating_point_operations_apart_from_speeds() -> None:
    model = compose_run(V3).model
    work, parameters = count_work(model, 4096, is_fp8=False), count_parameters(model)
    assert work.head == model.vocab_size * model.hidden_size
    assert work.mtp > work.moe + work.head
    # Without the layers' slower products and scores, a token of the main model takes these multiplications.
    layers = work.total(model) - work.embedding - work.head - work.mtp
    assert 1.5 < layers / (training_flops_per_token(model, 4096) / 6 - work.head) < 1.75
    assert parameters.active_without_embedding < layers + work.head


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
