"""Tests of plans, generation and evaluation from Python: they return what the commands print and write."""

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from base.refusal import ConfigError
from launch.api import LoadedModel, load, metrics, plan
from launch.evaluate import main as evaluate
from launch.generate import main as generate
from launch.plan import main as plan_command
from tests.refusals import assert_refused
from tests.tiny import MODEL

QUICK = {"max_new_tokens": 6, "seed": 3}


@pytest.fixture(scope="module")
def model(run: Path) -> LoadedModel:
    return load(run)


@pytest.mark.parametrize("form", ["text", "json", "html"])
def test_plan_is_that_of_the_command(form: str, tmp_path: Path) -> None:
    overrides = ["experiment=quickstart", "what_if=['schedule=1f1b']"]
    answer = plan(*overrides)
    assert plan_command([*overrides, f"format={form}", f"out={tmp_path / 'printed'}"]) == 0
    name = {"text": "a.txt"}.get(form, f"a.{form}")
    assert answer.save(tmp_path / name).read_text() == (tmp_path / "printed").read_text()
    assert json.loads(answer.render("json")) == json.loads(json.dumps(answer.values))
    assert answer.values["fits"] is True


def test_generation_is_that_of_the_command(model: LoadedModel, run: Path, tmp_path: Path) -> None:
    texts = ["def f(x):", "import os"]
    (tmp_path / "prompts.txt").write_text("\n".join(texts))
    options = [f"{key}={value}" for key, value in QUICK.items()]
    assert generate([f"ckpt={run}", f"prompts={tmp_path}/prompts.txt", f"out={tmp_path}/made.jsonl", *options]) == 0
    made = [json.loads(line) for line in (tmp_path / "made.jsonl").read_text("utf-8").splitlines()]
    several = model.generate(texts, **QUICK)
    assert isinstance(several, list)
    assert [json.loads(transcript.json_line()) for transcript in several] == made
    one = model.generate(texts[0], **QUICK)
    assert str(one) == made[0]["text"]
    assert model.generate(several[0].prompt.tokens, **QUICK).tokens == made[0]["tokens"]  # type: ignore[union-attr]


def test_evaluation_is_that_of_the_command(model: LoadedModel, run: Path, tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("Some notes to measure.\n" * 9)
    arguments = [f"ckpt={run}", "tasks=[bits_per_byte]", f"bits_per_byte.path={notes}", f"out={tmp_path}/command"]
    assert evaluate(arguments) == 0
    expected = json.loads((tmp_path / "command" / "results.json").read_text())["tasks"]
    settings = {"path": str(notes)}
    for out in (None, tmp_path / "own", tmp_path / "own"):  # without a folder, in a new one, in the complete one
        report = model.evaluate("bits_per_byte", bits_per_byte=settings, out=out)
        assert report.tasks == expected
        assert repr(report).startswith("bits_per_byte  bits_per_byte ")
    assert not [*Path(tempfile.gettempdir()).glob("evaluation-*/results.json")]


@pytest.mark.parametrize(
    ("act", "parts"),
    [
        (lambda model: load("none"), ["ckpt: ", "'none'"]),
        (lambda model: plan("experiment=quickstart", "rank=3"), ["rank: unknown key", "ranks"]),
        (lambda model: model.generate("a", temprature=1), ["temprature: no option of generate", "temperature?"]),
        (lambda model: model.generate("a", ckpt="b"), ["ckpt: no option of generate", "max_new_tokens"]),
        (lambda model: model.generate("a", temperature=-1), ["temperature: ", "at least 0"]),
        (lambda model: model.generate("a", stop="b"), ["stop: must be a list", "is 'b'"]),
        (lambda model: model.generate([]), ["prompt 1: must have at least one token"]),
        (lambda model: model.generate(["a", [MODEL.vocab_size]]), ["prompt 2: tokens must be"]),
        (lambda model: model.evaluate("bits"), ["tasks[0]", "did you mean bits_per_byte?"]),
        (lambda model: model.evaluate(), ["tasks: must name at least one task"]),
        (lambda model: model.evaluate("bits_per_byte", bits_per_byte=3), ["bits_per_byte: "]),
        (lambda model: model.evaluate("bits_per_byte", bits_per_byte={"pat": 1}), ["bits_per_byte.pat", "path"]),
    ],
)
def test_what_is_not_valid_is_refused(act: Callable[[LoadedModel], Any], parts: list[str], model: LoadedModel) -> None:
    assert_refused(ValueError, parts, lambda: act(model))


def test_metrics_are_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ConfigError, match=r"holds no config\.yaml"):
        metrics(tmp_path)
    (tmp_path / "config.yaml").write_text("name: toy\n")
    lines = [
        {"step": 1, "step_time": {"bubble": 0.5}},
        {"step": 2, "step_time": {"bubble": 0.25}, "validation_loss": 3.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines) + '{"step": 3')
    columns = metrics(tmp_path)
    assert columns == {"step": [1, 2], "step_time.bubble": [0.5, 0.25], "validation_loss": [None, 3.0]}
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=lambda columns: ("frame", columns)))
    assert metrics(tmp_path) == ("frame", columns)
