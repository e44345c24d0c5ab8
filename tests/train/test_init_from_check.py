"""Weights that a run cannot start from are refused before anything starts, by headers alone; those that fit are not."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from launch.config.run_config import check
from launch.convert import main as convert
from model.config import ModelConfig
from model.hf.files import HfError
from model.hf.reader import HfReader
from tests.launch.test_config import build
from tests.train.test_command import ROOT, run_train
from tests.train.weight_jobs import run_config
from tests.train.weight_sources import make_sources
from train.checkpoint.manifest import CheckpointError, write_manifest
from train.config import TrainConfig
from train.config.errors import ConfigError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adds to `make_sources`: `ours`, converted weights, and `run`, a run's folder with the weights after two steps."""
    folder = make_sources(tmp_path_factory.mktemp("init_from"))
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


def of_preset(source: Path, model: ModelConfig, **changes: object) -> TrainConfig:
    config = of_checkpoint(source)
    return replace(config, model=replace(model, **changes))  # type: ignore[arg-type]


def test_check_accepts_what_fits(folder: Path) -> None:
    sources = [folder / "mtp", folder / "run", folder / "run" / "checkpoints" / "step-00000002", folder / "ours"]
    for source in sources:
        config = of_checkpoint(source)
        assert config.model == HfReader(folder / "mtp").config
        check(config)
    assert of_checkpoint(folder / "plain").model.mtp_depth == 0
    for change in ("mtp_depth=0", "initializer_range=0.5", "max_position_tokens=4096"):
        check(of_checkpoint(folder / "mtp", f"+model.{change}"))
    check(of_checkpoint(folder / "plain", "+model.mtp_depth=1", "init_mtp=fresh"))


def test_check_needs_no_torch(folder: Path) -> None:
    code = f"""
import sys
from launch.config.run_config import check, compose_run
overrides = ["model=of_checkpoint", "data.tokenizer_vocab_size=320", "batch.sequence_length_tokens=32"]
runs = ["mtp seed=1", "ours seed=1", "mtp +model.hidden_size=25", "plain +model.mtp_depth=1"]
for name, change in map(str.split, runs):
    try:
        check(compose_run([*overrides, f"init_from={folder}/{{name}}", change]))
        print("passes")
    except ValueError as error:
        print(str(error).partition(":")[0])
print([name for name in ("torch", "transformers") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["passes", "passes", "init_from", "model.mtp_depth", "[]"], done.stderr


def test_check_refuses_init_from_together_with_resume(folder: Path) -> None:
    config = run_config(folder, "mtp", "one", "run")
    config = replace(config, resume=str(folder / "run"), task=replace(config.task, steps=3))
    check(replace(config, init_from=None))
    with pytest.raises(ConfigError, match=r"^init_from: must be null with resume="):
        check(config)


def test_check_names_every_key_that_differs(folder: Path) -> None:
    model = HfReader(folder / "mtp").config
    with pytest.raises(CheckpointError) as refused:
        check(of_preset(folder / "mtp", model, num_heads=4, norm_eps=1e-5, q_lora_rank=None))
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
    source: str, overrides: list[str], error: type[Exception], parts: list[str], folder: Path
) -> None:
    if source == "cut" and not (folder / "cut").exists():
        (folder / "cut").mkdir()
        for path in (folder / "mtp").iterdir():
            (folder / "cut" / path.name).write_bytes(path.read_bytes())
        os.truncate(folder / "cut" / "model-00002-of-00003.safetensors", 5000)
    with pytest.raises(error) as refused:
        check(of_checkpoint(folder / source, *overrides))
    for part in parts:
        assert part in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_command_refuses_weights_before_anything_starts(folder: Path) -> None:
    before = sorted(folder.iterdir())
    done = run_train(folder, "refused", "model=tiny", f"init_from={folder / 'mtp'}")
    assert done.returncode == 2
    assert done.stderr.startswith("error: init_from: ")
    assert "model.hidden_size is 24 there and 16 here" in done.stderr
    assert done.stderr.count("\n") == 1
    assert sorted(folder.iterdir()) == before
