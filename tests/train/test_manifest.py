"""Tests from which checkpoints a run may resume."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.launch.test_config import build
from train.checkpoint.locate import locate
from train.checkpoint.manifest import (
    CheckpointError,
    layout_record,
    read_manifest,
    read_step,
    write_manifest,
)
from train.checkpoint.verify import check_compatible


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


def test_manifest_of_an_older_release_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"format_version": 1, "step": 1}')
    with pytest.raises(CheckpointError, match=r"^resume: .* must have format_version 4, has 1 of an older release"):
        read_manifest(tmp_path)


def test_manifest_a_run_without_steps_left_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, 120)
    with pytest.raises(CheckpointError, match=r"^task\.steps: must be above the 120 steps.*nearest valid: 121"):
        check_compatible(folder, build("task.steps=120"))
    check_compatible(folder, build("task.steps=121"))


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format_version": 99, "step": 1}', '{"format_version": 1}', "3"])
def test_manifest_that_cannot_be_read_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"^resume: "):
        read_manifest(tmp_path)


def test_manifest_without_a_model_is_another_architecture(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"format_version": 4, "step": 3}))
    with pytest.raises(CheckpointError, match="another architecture"):
        check_compatible(tmp_path, replace(build(), name="x"))
