"""From which checkpoints a run may resume, and where the files of ranks are."""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from base.refusal import ConfigError
from comm.config import ParallelismConfig
from comm.exits import EXIT_HANG
from data.prepare import prepare
from launch.config.folder import check_content
from launch.config.run import compose_run
from model.transformer import named_tensors
from tests.ranks import run_ranks
from tests.tiny import BATCH, tiny_config, write_text
from tests.train.job import close_job, open_job, save_checkpoint
from tests.train.test_optim import copied
from train.checkpoint import load as checkpoint
from train.checkpoint.load import verify_together
from train.checkpoint.locate import check_compatible, locate
from train.checkpoint.manifest import (
    CheckpointError,
    is_file_name,
    layout_record,
    read_manifest,
    read_step,
    write_manifest,
)
from train.checkpoint.parts import state_of
from train.checkpoint.sources import CheckpointReader
from train.config import TrainConfig
from train.files.run_files import ExitReason, RankFiles, find_errors, find_rank_files, find_verdict, write_error


@cache
def build(*overrides: str) -> TrainConfig:
    return compose_run(overrides)


def save(run: Path, step: int, *overrides: str, complete: bool = True) -> Path:
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    if complete:
        write_manifest(folder, step, build(*overrides), "f00d")
    return folder


def test_manifest_of_the_same_run_passes(tmp_path: Path) -> None:
    folder = save(tmp_path, 20, "experiment=quickstart")
    check_compatible(folder, build("experiment=quickstart", "optim.learning_rate=1e-4", "name=other"))
    assert read_step(folder) == 20
    assert [path.name for path in folder.iterdir()] == ["manifest.json"]


def test_manifest_other_samples_are_refused_with_both_fingerprints(tmp_path: Path) -> None:
    folder = save(tmp_path, 20)
    check_compatible(folder, build(), data_fingerprint="f00d")
    with pytest.raises(CheckpointError, match=r"^resume: .*f00d.*data\.\*.*beef"):
        check_compatible(folder, build(), data_fingerprint="beef")


@pytest.mark.parametrize("change", ["batch.global_sequences=16", "batch.sequence_length_tokens=128", "data.seed=5"])
def test_manifest_another_order_of_samples_is_refused(change: str, tmp_path: Path) -> None:
    folder = save(tmp_path, 20, "batch.global_sequences=32", "validation.sequences=32")
    key = change.partition("=")[0]
    with pytest.raises(CheckpointError, match=key.replace(".", r"\.")):
        check_compatible(folder, build("batch.global_sequences=32", "validation.sequences=32", change))


def test_manifest_newest_complete_checkpoint_of_a_run_is_found(tmp_path: Path) -> None:
    save(tmp_path, 20)
    newest = save(tmp_path, 100)
    save(tmp_path, 120, complete=False)
    partial = tmp_path / "checkpoints" / "step-00000140.partial"
    partial.mkdir()
    write_manifest(partial, 140, build(), "f00d")
    assert locate(str(tmp_path)).folder == newest
    assert locate(str(tmp_path / "checkpoints")).folder == newest
    assert locate(str(tmp_path / "checkpoints" / "step-00000020")).folder.name == "step-00000020"


@pytest.mark.parametrize(
    ("place", "parts"),
    [
        ("runn", ["is no folder", "did you mean", "run"]),
        ("empty", ["holds no checkpoint", "step-NNNNNNNN"]),
        ("half", ["no complete checkpoint", "step-00000020 was never finished"]),
        (".", ["holds no checkpoint", "did you mean"]),
        ("half/checkpoints/step-00000020", ["holds no checkpoint"]),
    ],
)
def test_manifest_path_without_a_checkpoint_is_refused(place: str, parts: list[str], tmp_path: Path) -> None:
    save(tmp_path / "run", 20)
    save(tmp_path / "half", 20, complete=False)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"^resume: ") as refused:
        locate(str(tmp_path / place))
    for part in parts:
        assert part in str(refused.value)


def test_manifest_another_architecture_is_refused_with_both_values(tmp_path: Path) -> None:
    folder = save(tmp_path, 20)
    with pytest.raises(CheckpointError) as refused:
        check_compatible(folder, build("model.hidden_size=64", "model.q_lora_rank=null", "parallelism=four_ranks"))
    text = str(refused.value)
    assert "another architecture" in text
    assert "model.hidden_size is 192 there and 64 here" in text
    assert "model.q_lora_rank is 96 there and None here" in text
    assert "parallelism" not in text


def test_manifest_another_rope_is_another_architecture(tmp_path: Path) -> None:
    folder = save(tmp_path, 20, "model=v3_671b")
    plain = build("model=v3_671b", "~model.rope_scaling", "+model.rope_scaling={kind:plain}")
    with pytest.raises(CheckpointError, match=r"model\.rope_scaling\.kind is yarn there and plain here"):
        check_compatible(folder, plain)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["precision=bf16"], "precision.kind is float32 there and bf16 here"),
        (["data.tokenizer_vocab_size=2000"], "data.tokenizer_vocab_size is 2048 there and 2000 here"),
    ],
)
def test_manifest_other_numbers_are_refused(overrides: list[str], line: str, tmp_path: Path) -> None:
    folder = save(tmp_path, 20)
    with pytest.raises(CheckpointError) as refused:
        check_compatible(folder, build(*overrides))
    assert line in str(refused.value)
    assert f"init_from={folder}" in str(refused.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["parallelism=four_ranks"],
        ["schedule=dualpipe_v", "batch.micro_sequences=1"],
        ["schedule.chunks=1"],
        ["optim.sharding=replicated", "optim.moments=bf16"],
        ["dispatch=local", "parallelism=one_rank"],
    ],
)
def test_manifest_of_another_layout_passes(overrides: list[str], tmp_path: Path) -> None:
    folder = save(tmp_path, 20)
    config = build(*overrides)
    check_compatible(folder, config)
    assert layout_record(build()) == read_manifest(folder)["layout"]
    assert (layout_record(config) == layout_record(build())) is (overrides[0] == "optim.sharding=replicated")


def test_manifest_a_run_without_steps_left_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, 120)
    with pytest.raises(CheckpointError, match=r"^task\.steps: must be above the 120 steps.*nearest valid: 121"):
        check_compatible(folder, build("task.steps=120"))
    check_compatible(folder, build("task.steps=121"))


def test_manifest_from_before_the_key_adds_two_scores_of_a_group(tmp_path: Path) -> None:
    two, as_before = "model.num_experts_per_token=2", "model.group_score_experts=2"
    for number, overrides in enumerate([(), (two,)]):
        folder = save(tmp_path, number, *overrides)
        values = json.loads((folder / "manifest.json").read_text())
        assert values["model"].pop("group_score_experts") is None
        assert values["model"].pop("router") == "sigmoid"
        (folder / "manifest.json").write_text(json.dumps(values))
    check_compatible(tmp_path / "checkpoints" / "step-00000000", build())
    check_compatible(folder, build(two, as_before))
    with pytest.raises(CheckpointError, match=r"model\.group_score_experts is 2 there and None here"):
        check_compatible(folder, build(two))


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format_version": 99, "step": 1}', '{"format_version": 1}', "3"])
def test_manifest_that_cannot_be_read_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"^resume: "):
        read_manifest(tmp_path)


def test_manifest_without_a_model_is_another_architecture(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"format_version": 4, "step": 3}))
    with pytest.raises(CheckpointError, match="another architecture"):
        check_compatible(tmp_path, replace(build(), name="x"))


@pytest.mark.slow
@pytest.mark.parametrize(("num_ranks", "ranks_per_node"), [(4, 2), (1024, 8), (1032, 8), (100_352, 8)])
def test_names_of_all_ranks_sort_by_rank_and_folders_are_small(num_ranks: int, ranks_per_node: int) -> None:
    parent = Path("log")
    files = [RankFiles(rank, num_ranks, ranks_per_node) for rank in range(num_ranks)]
    paths = [str(each.folder(parent) / f"{each.stem}.log") for each in files]
    assert paths == sorted(paths)
    if num_ranks <= 1024:
        assert paths[3] == "log/rank_00003.log"
    else:
        assert paths[17] == "log/node_000002/rank_000017.log"
        assert len({each.subfolder for each in files}) == num_ranks // ranks_per_node


def test_errors_of_a_large_job_are_found_in_the_folders_of_nodes(tmp_path: Path) -> None:
    places = [RankFiles(rank, 2048, 8) for rank in (1500, 3)]
    write_error(tmp_path, places[0], ExitReason("rank 7 is lost", EXIT_HANG), "details")
    write_error(tmp_path, places[1], ExitReason("other", 1), "details")
    assert [path.name for path in find_errors(tmp_path)] == ["rank_001500.error.log", "rank_000003.error.log"]
    assert find_rank_files(tmp_path / "log", "*.error.log")[0].parent.name in ("node_000187", "node_000000")
    verdict = find_verdict(tmp_path)
    assert verdict is not None
    assert verdict[1] == ExitReason("rank 7 is lost", EXIT_HANG)
    check_content(tmp_path)
    with pytest.raises(FileNotFoundError):  # a deleted folder of a run is not created again
        write_error(tmp_path / "gone", places[0], ExitReason("", 1), "")


@pytest.mark.parametrize(("name", "makes_link"), [("node_000001", True), ("node_1", False), ("other", False)])
def test_folder_of_logs_contains_files_and_folders_of_nodes_alone(tmp_path: Path, name: str, makes_link: bool) -> None:
    (tmp_path / "log").mkdir()
    (tmp_path / "outside").mkdir()
    if makes_link:
        (tmp_path / "log" / name).symlink_to(tmp_path / "outside")
    else:
        (tmp_path / "log" / name).mkdir()
    with pytest.raises(ConfigError, match=f"{name} in it must be a file"):
        check_content(tmp_path)


def test_link_in_the_folder_of_a_node_is_rejected(tmp_path: Path) -> None:
    folder = RankFiles(9, 2048, 8).make_folder(tmp_path / "log")
    (folder / "rank_000009.log").symlink_to(tmp_path / "precious")
    with pytest.raises(ConfigError, match=r"rank_000009.log in it must be a file, .* is a symbolic link"):
        check_content(tmp_path)


@pytest.mark.parametrize(
    ("name", "is_allowed"),
    [
        ("rank_00000.safetensors", True),
        ("node_000012/rank_000099.safetensors", True),
        ("node_000012/../../secret", False),
        ("../node_000012/file", False),
        ("node_000012/..", False),
        ("node_000012/", False),
        ("node_12/file", False),
        ("node_000012/node_000012/file", False),
        ("/node_000012/file", False),
        ("/etc/passwd", False),
        ("..", False),
        (".", False),
        ("", False),
        ("file\0", False),
        ("node_00001\u0662/file", False),
    ],
)
def test_file_names_of_a_checkpoint_stay_in_its_folder(name: str, is_allowed: bool) -> None:
    assert is_file_name(name) is is_allowed


def _config(folder: Path, name: str) -> TrainConfig:
    return tiny_config(
        folder,
        out_dir=str(folder / name),
        parallelism=ParallelismConfig(pipeline=2, data=2, expert=2),
        batch=replace(BATCH, global_sequences=8, micro_sequences=2),
    )


def _save_and_load(rank: int, world_size: int, config: TrainConfig) -> tuple[bool, str]:
    """Saves in the layout of a large job, and loads in that of a small one."""
    learner = open_job(config)
    for tensor in named_tensors(learner.replica.model).values():
        tensor.mul_(1.5)  # other weights than those of the seed
    saved = copied(state_of(learner, {}))
    with mock.patch("train.files.run_files.MOST_FLAT_RANKS", 3):
        place = save_checkpoint(config, learner, 1, prepare(config.data, config.batch.sequence_length_tokens))
    verify_together(place)
    other = open_job(config)
    was_same = equal(copied(state_of(other, {})), saved)
    checkpoint.load(other, place)
    is_same = not was_same and equal(copied(state_of(other, {})), saved)
    close_job(learner)
    close_job(other)
    return is_same, str(place)


def equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.slow
def test_checkpoint_of_a_large_job_has_a_folder_per_node_and_loads_like_a_flat_one(tmp_path: Path) -> None:
    write_text(tmp_path)
    (tmp_path / "run").mkdir()
    ended = run_ranks(4, _save_and_load, _config(tmp_path, "run"))
    assert [is_same for is_same, _ in ended] == [True] * 4
    place = Path(ended[0][1])
    names = {name for name in read_manifest(place)["files"] if name.endswith(".safetensors")}
    assert names == {f"node_{rank // 2:06d}/rank_{rank:06d}.safetensors" for rank in range(4)}
    assert {path.relative_to(place).as_posix() for path in place.rglob("*.safetensors")} == names
    reader = CheckpointReader(place, "resume")  # one process reads the whole model
    assert reader.tensor("model.embed_tokens.weight", torch.float32).isfinite().all()
