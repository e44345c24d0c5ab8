"""Tests of `data.tokenizer` with initial weights and with a run to resume."""

from dataclasses import replace
from pathlib import Path

import pytest

from data.corpus import DataError
from launch.config.run_config import check, read_config, write_config
from tests.data.released_tokenizer import VOCAB_SIZE, write_released
from tests.launch.test_config import build, place_weights
from train.checkpoint.manifest import CheckpointError, write_manifest
from train.checkpoint.verify import check_compatible
from train.config import TrainConfig
from train.config.errors import ConfigError

TEXTS = ["def f(x):\n    return x + 1\n"] * 9


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Creates converted weights with a tokenizer, with only the files that these tests need."""
    folder = Path(place_weights(tmp_path / "weights"))
    write_released(folder / "tokenizer.json", TEXTS)
    return folder


def place_checkpoint(run: Path, config: TrainConfig) -> Path:
    folder = run / "checkpoints" / "step-00000005"
    folder.mkdir(parents=True)
    write_released(folder / "tokenizer.json", TEXTS)
    write_manifest(folder, 5, config, "f00d")
    return folder


def chosen(*overrides: str) -> str | None:
    config = build(*overrides)
    assert read_config(write_config(config)) == config
    return config.data.tokenizer


def test_tokenizer_of_the_weights_is_taken_unless_another_is_named(weights: Path, tmp_path: Path) -> None:
    own = str(weights / "tokenizer.json")
    assert chosen() is None
    assert chosen(f"init_from={weights}") == own
    assert chosen(f"init_from={weights}", "data.tokenizer=null") is None
    other = write_released(tmp_path / "other.json", TEXTS)
    assert chosen(f"init_from={weights}", f"data.tokenizer={other}") == str(other)
    assert chosen(f"data.tokenizer={weights}") == own
    (weights / "tokenizer.json").unlink()
    assert chosen(f"init_from={weights}") is None


def test_tokenizer_of_a_run_is_that_of_its_newest_checkpoint(tmp_path: Path) -> None:
    own = str(place_checkpoint(tmp_path / "run", build()) / "tokenizer.json")
    for place in (tmp_path / "run", tmp_path / "run" / "checkpoints" / "step-00000005", own):
        assert chosen(f"data.tokenizer={place}") == own
    assert chosen(f"init_from={tmp_path / 'run'}") == own


def test_tokenizer_of_a_resumed_run_is_the_given_one(weights: Path, tmp_path: Path) -> None:
    given, trained = build(f"init_from={weights}"), build()
    own = place_checkpoint(tmp_path / "given", replace(given, init_from=None)) / "tokenizer.json"
    place_checkpoint(tmp_path / "trained", trained)
    for name, tokenizer in (("given", str(own)), ("trained", None)):
        config = build(f"resume={tmp_path / name}")
        assert config.data.tokenizer == tokenizer
        check_compatible(tmp_path / name / "checkpoints" / "step-00000005", config)
    # What was ignored before may differ now.
    check_compatible(own.parent, build(f"resume={tmp_path / 'given'}", "data.tokenizer_vocab_size=300"))
    with pytest.raises(CheckpointError, match=r"data\.tokenizer is given there and None here"):
        check_compatible(own.parent, build(f"resume={tmp_path / 'given'}", "data.tokenizer=null"))


def test_tokenizer_must_fit_the_model(weights: Path) -> None:
    choices = ("data.tokenizer_vocab_size=99999", "task.steps=1")  # the size is ignored
    check(replace(build(f"init_from={weights}", f"model.vocab_size={VOCAB_SIZE}", *choices), init_from=None))
    with pytest.raises(ConfigError) as refused:
        check(build(f"data.tokenizer={weights}", *choices))
    for part in ("data.tokenizer: must have at most model.vocab_size=2048", f"has {VOCAB_SIZE}", "data.tokenizer=null"):
        assert part in str(refused.value)


@pytest.mark.parametrize(
    ("place", "parts"),
    [
        ("absent.json", ["data.tokenizer: must be auto, null", "absent.json", "nearest valid: auto"]),
        ("weights/tokeniser.json", ["did you mean tokenizer.json"]),
        ("empty", ["data.tokenizer: ", "must hold a tokenizer.json, holds none"]),
        ("", ["data.tokenizer: must be auto, null", "is ''"]),
    ],
)
def test_tokenizer_that_is_not_there_is_rejected(place: str, parts: list[str], weights: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError) as refused:
        build(f"data.tokenizer={tmp_path / place if place else ''}")
    for part in parts:
        assert part in str(refused.value)
    assert "\n" not in str(refused.value)


def test_tokenizer_that_is_none_is_rejected(weights: Path) -> None:
    (weights / "tokenizer.json").write_text("{}")
    for choice in ("init_from", "data.tokenizer"):
        with pytest.raises(DataError, match=r"^data\.tokenizer: .*must be a saved tokenizer"):
            check(build(f"{choice}={weights}"))
    with pytest.raises(ConfigError, match=r"^data\.tokenizer: must be text"):
        build("data.tokenizer=3")
