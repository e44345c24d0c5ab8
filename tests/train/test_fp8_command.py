"""Tests the command in FP8: the configurations that it composes and refuses, and a resumed run."""

import subprocess
import sys
from pathlib import Path

import pytest

from launch.config.run_config import check, compose_run
from tests.commands import run_command
from tests.tiny import write_text
from tests.train.test_command import read_metrics
from train.config import Fp8PrecisionConfig, TrainConfig
from train.config.errors import ConfigError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("command")
    write_text(folder)
    return folder


def composed(*overrides: str) -> TrainConfig:
    config = compose_run(["precision=fp8", *overrides])
    check(config)
    return config


def test_fp8_is_composed_with_scales_of_either_kind() -> None:
    assert composed().precision == Fp8PrecisionConfig(kind="fp8", scales="float32")
    assert composed().computing.products == "fp8"
    assert composed("precision.scales=power_of_two").computing.products == "fp8_power_of_two"
    assert compose_run(["precision=bf16"]).computing.products == "own"


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("precision.scales=powers", ["precision.scales", "float32, power_of_two", "'powers'"]),
        ("precision.scale=float32", ["precision.scale", "precision.scales"]),
        ("optim.sharding=replicated", ["optim.sharding", "fp8", "zero1", "replicated"]),
        ("recompute=[norm]", ["recompute", "fp8", "[norm]", "[norm,mla_up,swiglu]"]),
        ("optim.moments=aut", ["optim.moments", "auto, float32, bf16", "'aut'", "did you mean auto?"]),
        ("optim.moments=null", ["optim.moments", "auto, float32, bf16", "None"]),
    ],
)
def test_configuration_that_fp8_does_not_support_is_refused(override: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        composed(override)
    message = str(raised.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def train(folder: Path, name: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Trains one rank of the tiny model on the text in `folder`."""
    command = [
        *(sys.executable, "-m", "launch.train", f"name={name}", f"out_dir={folder / name}", "model=tiny"),
        *("parallelism=one_rank", "schedule=1f1b", "dispatch=local", "data=files", f"data.paths=[{folder / 'text'}]"),
        *(f"data.cache_dir={folder / 'cache'}", "data.tokenizer_vocab_size=320", "data.validation_fraction=0.2"),
        *("batch.sequence_length_tokens=32", "batch.global_sequences=8", "batch.micro_sequences=4"),
        *("validation.sequences=0", "validation.every_steps=0", "samples.prompt=", *overrides),
    ]
    return run_command(command)


@pytest.mark.slow
def test_resumed_command_equals_uninterrupted_bitwise(folder: Path) -> None:
    done = train(folder, "whole", "precision=fp8", "task.steps=2", "checkpointing.every_steps=1")
    assert done.returncode == 0, done.stderr
    from_first = f"resume={folder / 'whole' / 'checkpoints' / 'step-00000001'}"
    done = train(folder, "again", "precision=fp8", "task.steps=2", from_first)
    assert done.returncode == 0, done.stderr
    uninterrupted, again = read_metrics(folder, "whole"), read_metrics(folder, "again")
    assert [line["step"] for line in again] == [2]
    for line, expected in zip(again, uninterrupted[1:], strict=True):
        for key in ("loss", "main_loss", "mtp_loss", "balance_loss", "grad_norm", "max_violation"):
            assert line[key] == expected[key], key
