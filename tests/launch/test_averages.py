"""Tests of `weights=ema`: text and Hugging Face folders from a run's average of its weights."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launch.convert import main as convert
from launch.generate import main as generate
from model.transformer import named_tensors
from tests.infer.models import make_foresighted
from tests.launch.checkpoints import write_checkpoint
from train.checkpoint.manifest import CheckpointError
from train.config.errors import ConfigError


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Creates `both`, a model with another one as its average, and `average`, the other one without an average."""
    folder = tmp_path_factory.mktemp("averages")
    trained, average = make_foresighted(dtype=torch.float32), make_foresighted(dtype=torch.float32)
    for place, weight in enumerate(named_tensors(average).values()):
        weight.mul_(1 + 0.05 * (place % 3))
    write_checkpoint(folder / "both", trained, average=average)
    write_checkpoint(folder / "average", average)
    return folder


def _made(capsys: pytest.CaptureFixture[str], *choices: str) -> str:
    assert generate(["prompt=def", "max_new_tokens=24", "seed=5", *choices]) == 0
    return capsys.readouterr().out


def test_generate_from_the_average_is_that_models_text(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    averaged = _made(capsys, f"ckpt={runs / 'both'}", "weights=ema")
    assert averaged == _made(capsys, f"ckpt={runs / 'average'}")
    assert averaged != _made(capsys, f"ckpt={runs / 'both'}")


def test_convert_writes_the_average(runs: Path, tmp_path: Path) -> None:
    for name, run, choices in (("one", "both", ["weights=ema"]), ("other", "average", []), ("third", "both", [])):
        assert convert(["from=checkpoint", f"path={runs / run}", f"to={tmp_path / name}", *choices]) == 0
    one, other, third = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "other", "third"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not all(torch.equal(one[name], third[name]) for name in one)


def test_average_that_a_run_did_not_keep_is_rejected(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"ckpt: .*: weights: must be trained, because the run kept no average"):
        generate(["prompt=def", f"ckpt={runs / 'average'}", "weights=ema"])
    with pytest.raises(CheckpointError, match=r"path: .*: weights: must be trained, because the run kept no average"):
        convert(["from=checkpoint", f"path={runs / 'average'}", f"to={tmp_path / 'none'}", "weights=ema"])
    assert not (tmp_path / "none").exists()
    assert convert(["from=checkpoint", f"path={runs / 'average'}", f"to={tmp_path / 'hf'}"]) == 0
    with pytest.raises(ConfigError, match=r"weights: must be trained, as ckpt=.* is a Hugging Face folder, is ema"):
        generate(["prompt_ids=[1]", f"ckpt={tmp_path / 'hf'}", "weights=ema"])
    with pytest.raises(ConfigError, match=r"weights: must be trained with from=hf, is ema; nearest valid: trained"):
        convert(["from=hf", f"path={tmp_path / 'hf'}", f"to={tmp_path / 'none'}", "weights=ema"])
