"""Runs that start from given weights: the numbers of one process, and refusals before anything starts."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, DeepseekV3ForCausalLM

from base.refusal import ConfigError
from data.prepare import prepare
from launch.config.run import check
from launch.convert import main as convert
from model.config import ModelConfig
from model.hf.files import HfError
from model.hf.reader import HfReader
from model.transformer import BIAS
from tests import ROOT
from tests.data.released_tokenizer import write_released
from tests.launch.test_config import build
from tests.model.hf_checkpoints import read_tensors, reference_logits
from tests.ranks import run_ranks
from tests.tiny import BATCH, OPTIM, TASK
from tests.train.job import open_loader
from tests.train.test_command import run_train
from tests.train.weight_jobs import FILE_LIMITS_BYTES, LAYOUTS, Started, run_config, start_jobs, use_broken
from tests.train.weight_sources import make_sources
from train.checkpoint.load import load_whole
from train.checkpoint.manifest import CheckpointError, read_model, write_manifest
from train.config import PrecisionConfig, TrainConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sources(tmp_path_factory.mktemp("init_from"))


def run(layout: str, *configs: TrainConfig, saves: bool = False) -> list[list[Started]]:
    """Returns the results by run, then by rank."""
    world = LAYOUTS[layout][0].world_size
    return [list(ranks) for ranks in zip(*run_ranks(world, start_jobs, list(configs), saves), strict=True)]


def merged(ranks: list[Started]) -> dict[str, Tensor]:
    """The whole model's weights at the end; every rank that holds one has the same."""
    weights: dict[str, Tensor] = {}
    for seen in ranks:
        for name, tensor in seen.last.items():
            torch.testing.assert_close(tensor, weights.setdefault(name, tensor), rtol=0, atol=0)
    return weights


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, list[Started]]:
    """Two steps from `mtp` on one rank and on four, saved."""
    return {
        layout: run(layout, run_config(folder, "mtp", layout, f"run_{layout}"), saves=True)[0]
        for layout in ("one", "four")
    }


@pytest.mark.slow
def test_start_every_rank_holds_the_files_values(folder: Path, runs: dict[str, list[Started]]) -> None:
    stored = read_tensors(folder / "mtp")
    for ranks in runs.values():
        names: set[str] = set()
        for seen in ranks:
            names |= seen.first.keys()
            for name, tensor in seen.first.items():
                assert torch.equal(tensor, stored[name].to(tensor.dtype)), name
        assert len(names) == len(stored) - 2  # the MTP module's copies of embedding and head
    held = {rank: len(seen.first) for rank, seen in enumerate(runs["four"])}
    assert {rank: number for rank, number in held.items() if number >= len(names)} == {}  # experts are shared out


def test_start_on_four_ranks_trains_as_on_one(runs: dict[str, list[Started]]) -> None:
    (one,), four = runs["one"], runs["four"]
    for seen in four:
        assert seen.losses == pytest.approx(one.losses, rel=1e-10)
    weights = merged(four)
    assert weights.keys() == one.last.keys()
    for name, tensor in one.last.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-8, atol=1e-10, msg=name)
        moved = not torch.equal(tensor, one.first[name])
        assert moved or "layernorm" in name or "norm" in name, name


@torch.no_grad()
def test_export_of_any_layout_is_the_same_model_to_transformers(
    folder: Path, runs: dict[str, list[Started]], tmp_path: Path
) -> None:
    exported, prepared = {}, prepare(run_config(folder, "mtp", "one", "x").data, BATCH.sequence_length_tokens)
    for layout, ranks in runs.items():
        target = tmp_path / layout
        assert convert(["from=checkpoint", f"path={ranks[0].checkpoint}", f"to={target}", "dtype=float32"]) == 0
        exported[layout] = read_tensors(target)
        tokenizer = AutoTokenizer.from_pretrained(target)
        assert tokenizer("a1 b2").input_ids == prepared.tokenizer.encode("a1 b2")
        assert tokenizer.eos_token_id == AutoConfig.from_pretrained(target).eos_token_id == 1
    for name, tensor in exported["one"].items():
        torch.testing.assert_close(exported["four"][name], tensor, rtol=1e-6, atol=1e-7, msg=name)
    checkpoint = runs["four"][0].checkpoint
    assert checkpoint is not None
    ours = load_whole(read_model(checkpoint), checkpoint, torch.float32)
    theirs = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "four", dtype=torch.float32).eval()
    tokens = open_loader(run_config(folder, "mtp", "one", "x")).batch(3, 0, 4).tokens_BT
    torch.testing.assert_close(ours(tokens), reference_logits(theirs, tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_start_from_a_run_of_another_layout_equals_its_export(
    folder: Path, runs: dict[str, list[Started]], tmp_path: Path
) -> None:
    """Our checkpoint and its export, one with 4 ranks as a run's folder, one converted, give the same first step."""
    assert convert(["from=checkpoint", f"path={folder / 'run_four'}", f"to={tmp_path / 'hf'}"]) == 0
    assert convert(["from=hf", f"path={tmp_path / 'hf'}", f"to={tmp_path / 'ours'}"]) == 0
    config = run_config(folder, "mtp", "one", "x", task=replace(TASK, steps=1))
    sources = [folder / "run_four", tmp_path / "hf", tmp_path / "ours"]
    ended = run("one", *(replace(config, init_from=str(source)) for source in sources))
    first = ended[0][0]
    assert "token ids" not in first.said
    assert first.losses[0] != runs["one"][0].losses[0]
    for name, tensor in merged(runs["four"]).items():
        assert torch.equal(first.first[name], tensor), name
    for (other,) in ended[1:]:
        assert other.losses == first.losses
        for name, tensor in first.last.items():
            assert torch.equal(other.last[name], tensor), name


@pytest.mark.slow
def test_start_updates_the_optimizer_masters(folder: Path) -> None:
    """A step that moves nothing would bring back the seed's weights from masters that did not."""
    config = run_config(
        folder,
        "mtp",
        "two",
        "masters",
        precision=PrecisionConfig(kind="bf16"),
        optim=replace(OPTIM, sharding="zero1", learning_rate=1e-30),
        task=replace(TASK, steps=1),
    )
    for seen in run("two", config)[0]:
        for name, tensor in seen.last.items():
            if not name.endswith(BIAS):
                assert torch.equal(tensor, seen.first[name]), name


def test_start_reports_differences_from_the_source(folder: Path, tmp_path: Path) -> None:
    """An MTP module from the seed is the seed's, whether one is there or not; another tokenizer and limit are named."""
    for path in (folder / "mtp").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "tokenizer.json").write_text("{}")
    model, task = replace(HfReader(folder / "plain").config, mtp_depth=1), replace(TASK, steps=0)
    config = run_config(folder, "plain", "one", "fresh", model=model, init_mtp="fresh", task=task)
    longer = replace(model, max_position_tokens=128)
    other = replace(config, init_from=str(tmp_path), model=longer)
    (fresh,), (over,) = run("one", config, other)
    assert fresh.said == f"weights from {folder / 'plain'} (MTP from the seed)"
    assert "token ids mean other text" in over.said
    assert "model.max_position_tokens is 64 there and 128 here" in over.said
    stored = read_tensors(folder / "mtp")
    for name, tensor in fresh.first.items():
        assert torch.equal(over.first[name], tensor), name
        if name.startswith("model.layers.3."):
            assert not torch.equal(tensor, stored[name].double()) or name.endswith("bias"), name
        else:
            assert torch.equal(tensor, stored[name].double()), name


@pytest.mark.slow
def test_checkpoints_that_cannot_be_read_or_written_end_every_rank(folder: Path) -> None:
    for read, written in run_ranks(2, use_broken, run_config(folder, "mtp", "two", "full")):
        place = folder / "full" / "checkpoints" / "step-00000000"
        assert read.startswith(f"resume: {place}: cannot be read by ranks 0, 1: rank_00001.safetensors: ")
        assert len(written) == len(FILE_LIMITS_BYTES)
        for error in written:
            assert "cannot be written by rank" in error
            assert error.endswith("File too large")
    assert not (folder / "full" / "checkpoints" / "step-00000001").exists()


@pytest.mark.slow
def test_command_starts_from_a_hugging_face_folder_with_its_tokenizer_and_records_the_whole_model(
    folder: Path,
) -> None:
    tokenizer = write_released(folder / "mtp" / "tokenizer.json", ["a1 b2 c3"] * 20, highest_id=319)
    choices = ("model=of_checkpoint", "parallelism=one_rank", f"init_from={folder / 'mtp'}")
    done = run_train(folder, "command", *choices, "task.steps=1", "samples.prompt=a1", "samples.tokens=4")
    assert done.returncode == 0, done.stderr
    printed = " ".join(done.stdout.split())
    assert f"weights from {folder / 'mtp'} " in printed
    assert f"tokenizer: from {tokenizer}; data.tokenizer_vocab_size is not used; ids below 320" in " ".join(
        done.stdout.split()
    )
    written = yaml.safe_load((folder / "command" / "config.yaml").read_text())
    assert written["model"]["hidden_size"] == 24
    assert "kind" not in written["model"]
    assert written["data"]["tokenizer"] == str(tokenizer)
    exported = folder / "exported"
    assert convert(["from=checkpoint", f"path={folder / 'command'}", f"to={exported}"]) == 0
    assert HfReader(exported).config == HfReader(folder / "mtp").config
    assert (exported / "tokenizer.json").read_bytes() == tokenizer.read_bytes()


@pytest.fixture(scope="module")
def folder_of_weights(folder: Path) -> Path:
    """Adds to `make_sources`: `ours`, converted weights, and `run`, a run's folder with the weights after two steps."""
    checkpoint = folder / "run" / "checkpoints" / "step-00000002"
    for target in (folder / "ours", checkpoint):
        assert convert(["from=hf", f"path={folder / 'mtp'}", f"to={target}"]) == 0
    write_manifest(checkpoint, 2, run_config(folder, "mtp", "one", "run"), "f00d")
    return folder


def of_checkpoint(source: Path, *overrides: str) -> TrainConfig:
    """A command's configuration that takes the model from the weights."""
    return build(
        "model=of_checkpoint",
        f"init_from={source}",
        "data.tokenizer_vocab_size=320",
        "batch.sequence_length_tokens=32",
        *overrides,
    )


def of_preset(source: Path, model: ModelConfig, **changes: Any) -> TrainConfig:
    config = of_checkpoint(source)
    return replace(config, model=replace(model, **changes))


def test_check_accepts_what_fits(folder_of_weights: Path) -> None:
    sources = [
        folder_of_weights / "mtp",
        folder_of_weights / "run",
        folder_of_weights / "run" / "checkpoints" / "step-00000002",
        folder_of_weights / "ours",
    ]
    for source in sources:
        config = of_checkpoint(source)
        assert config.model == HfReader(folder_of_weights / "mtp").config
        check(config)
    assert of_checkpoint(folder_of_weights / "plain").model.mtp_depth == 0
    # None is the number of scores that follows from other keys.
    model = replace(config.model, group_score_experts=None)
    for number in (None, model.num_group_scores):
        check(replace(config, model=replace(model, group_score_experts=number)))
    for change in ("mtp_depth=0", "initializer_range=0.5", "max_position_tokens=4096"):
        check(of_checkpoint(folder_of_weights / "mtp", f"+model.{change}"))
    check(of_checkpoint(folder_of_weights / "plain", "+model.mtp_depth=1", "init_mtp=fresh"))


@pytest.mark.slow
def test_check_needs_no_torch(folder_of_weights: Path) -> None:
    code = f"""
import sys
from launch.config.run import check, compose_run
overrides = ["model=of_checkpoint", "data.tokenizer_vocab_size=320", "batch.sequence_length_tokens=32"]
runs = ["mtp seed=1", "ours seed=1", "mtp +model.hidden_size=25", "plain +model.mtp_depth=1"]
for name, change in map(str.split, runs):
    try:
        check(compose_run([*overrides, f"init_from={folder_of_weights}/{{name}}", change]))
        print("passes")
    except ValueError as error:
        print(str(error).partition(":")[0])
print([name for name in ("torch", "transformers") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["passes", "passes", "init_from", "model.mtp_depth", "[]"], done.stderr


def test_check_refuses_init_from_together_with_resume(folder_of_weights: Path) -> None:
    config = run_config(folder_of_weights, "mtp", "one", "run")
    config = replace(config, resume=str(folder_of_weights / "run"), task=replace(config.task, steps=3))
    check(replace(config, init_from=None))
    with pytest.raises(ConfigError, match=r"^init_from: must be null with resume="):
        check(config)


def test_check_names_every_key_that_differs(folder_of_weights: Path) -> None:
    model = HfReader(folder_of_weights / "mtp").config
    with pytest.raises(CheckpointError) as refused:
        check(of_preset(folder_of_weights / "mtp", model, num_heads=4, norm_eps=1e-5, q_lora_rank=None))
    text = str(refused.value)
    assert text.startswith("init_from: ")
    assert "model.num_heads is 2 there and 4 here" in text
    assert "model.norm_eps is 1e-06 there and 1e-05 here" in text
    assert "model.q_lora_rank is 12 there and None here" in text
    assert "hidden_size" not in text
    assert "model=of_checkpoint" in text


@pytest.mark.parametrize(
    ("source", "overrides", "error", "parts"),
    [
        ("plain", ["+model.mtp_depth=1"], CheckpointError,
         ["model.mtp_depth: must be at most 0", "is 1", "model.mtp_depth=0", "init_mtp=fresh"]),
        ("mtp", ["+model.mtp_depth=2"], CheckpointError, ["must be at most 1", "is 2"]),
        ("mtp", ["+model.hidden_size=64"], CheckpointError, ["model.hidden_size is 24 there and 64 here"]),
        ("cut", [], HfError, ["model-00002-of-00003.safetensors"]),
        ("text", [], CheckpointError, ["init_from", "holds no checkpoint", "config.json"]),
        ("absent", [], CheckpointError, ["init_from", "no folder"]),
    ],
)  # fmt: skip
def test_check_refuses_what_does_not_fit(
    source: str, overrides: list[str], error: type[Exception], parts: list[str], folder_of_weights: Path
) -> None:
    if source == "cut" and not (folder_of_weights / "cut").exists():
        (folder_of_weights / "cut").mkdir()
        for path in (folder_of_weights / "mtp").iterdir():
            (folder_of_weights / "cut" / path.name).write_bytes(path.read_bytes())
        os.truncate(folder_of_weights / "cut" / "model-00002-of-00003.safetensors", 5000)
    with pytest.raises(error) as refused:
        check(of_checkpoint(folder_of_weights / source, *overrides))
    for part in parts:
        assert part in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_command_refuses_weights_before_anything_starts(folder_of_weights: Path) -> None:
    before = sorted(folder_of_weights.iterdir())
    done = run_train(folder_of_weights, "refused", "model=tiny", f"init_from={folder_of_weights / 'mtp'}")
    assert done.returncode == 2
    assert done.stderr.startswith("error: init_from: ")
    assert "model.hidden_size is 24 there and 16 here" in done.stderr
    assert done.stderr.count("\n") == 1
    assert sorted(folder_of_weights.iterdir()) == before
