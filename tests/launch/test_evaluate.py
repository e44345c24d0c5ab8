"""Tests of `launch.evaluate`: its files, continuation after an interruption, comparison, and rejected input."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from base.refusal import ConfigError
from data.corpus import DataError
from evaluation import run as evaluation_run
from evaluation.protocol import EVALUATION_TASKS, EvaluationError
from launch import place
from launch.evaluate import main
from tests import ROOT
from tests.documents import check_policy

QUESTIONS = [
    {"id": f"q{number}", "context": context, "choices": choices, "answer": number % 2}
    for number, (context, choices) in enumerate(
        [
            ("def f(x):", ["\n    return", " x"]),
            ("", ["naïve", "z"]),
            ("日本 ", ["語", "🙂 text"]),
            ("x " * 200, ["+", "1"]),
        ]
    )
]


def write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> Path:
    """Writes a file of JSON objects."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def arguments(run: Path, folder: Path, out: str = "out") -> list[str]:
    """Returns overrides that evaluate both tasks."""
    write_lines(folder / "c.jsonl", QUESTIONS)
    write_lines(folder / "p.jsonl", [{"id": 1, "text": "naïve café"}, {"id": 2, "text": "def " * 80, "source": "code"}])
    return [
        f"ckpt={run}",
        "tasks=[choice,bits_per_byte]",
        f"choice.path={folder}/c.jsonl",
        f"bits_per_byte.path={folder}/p.jsonl",
        f"out={folder}/{out}",
    ]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_results_follow_from_the_samples(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments(run, tmp_path), "bits_per_byte.loads=true"]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    samples = read(tmp_path / "out" / "samples_choice.jsonl")
    assert [sample["id"] for sample in samples] == [question["id"] for question in QUESTIONS]
    for sample, question in zip(samples, QUESTIONS, strict=True):
        assert len(sample["loglikelihoods"]) == len(sample["is_greedy"]) == len(question["choices"])  # type: ignore[arg-type]
        assert sample["chosen"] == max(range(2), key=sample["loglikelihoods"].__getitem__)
        assert sample["answer"] == question["answer"]
    right = [sample["chosen"] == sample["answer"] for sample in samples]
    choice, documents = results["tasks"]["choice"], results["tasks"]["bits_per_byte"]
    assert choice["accuracy"] == results["results"]["choice"]["accuracy,none"] == sum(right) / len(right)
    assert choice["num_samples"] == len(samples)
    assert choice["standard_error"] == pytest.approx(math.sqrt(sum(right) * (4 - sum(right)) / 4 / 3 / 4))
    assert choice["num_truncated"] == 1
    assert documents["num_bytes"] == len("naïve café".encode()) + 320
    nats = -sum(sample["loglikelihood"] for sample in read(tmp_path / "out" / "samples_bits_per_byte.jsonl"))
    assert documents["bits_per_byte"] == pytest.approx(nats / math.log(2) / documents["num_bytes"])
    assert set(documents["sources"]) == {"p.jsonl", "code"}
    # The token before each scored one chooses four experts in each layer, and placement weights the sources.
    records = read(tmp_path / "out" / "samples_bits_per_byte.jsonl")
    assert all(sum(loads) == 4 * record["num_tokens"] for record in records for loads in record["loads"].values())
    assert "contexts are longer" in capsys.readouterr().out
    for weights, total in (("null", 4 * documents["num_tokens"]), ("{code: 3}", 3)):
        assert place.main([f"loads={tmp_path}/out", "ranks=2", f"domains={weights}", "format=json"]) == 0
        placed = json.loads(capsys.readouterr().out)
        assert placed["num_groups"] == 4
        assert [*placed["layers"]] == [*records[0]["loads"]]
        assert all(sum(layer["rank_loads"]) == pytest.approx(total) for layer in placed["layers"].values())
    assert {"configs", "versions", "n-shot", "higher_is_better", "checkpoint", "seed"} <= set(results)
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "accuracy_per_byte" in page
    assert "://" not in page
    check_policy(page, has_script=False)


def test_interrupted_evaluation_continues(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(run, tmp_path, "whole")) == 0
    # Records of two questions, and a line that was cut.
    monkeypatch.setattr(evaluation_run, "REQUESTS_TOGETHER", 2)
    assert main(arguments(run, tmp_path)) == 0
    (tmp_path / "out" / "results.json").unlink()
    samples = tmp_path / "out" / "samples_choice.jsonl"
    lines = samples.read_bytes().splitlines(keepends=True)
    samples.write_bytes(b"".join(lines[:2]) + lines[2][:17])
    assert main(arguments(run, tmp_path)) == 0
    for name in ("samples_choice.jsonl", "samples_bits_per_byte.jsonl"):
        for mine, theirs in zip(read(tmp_path / "out" / name), read(tmp_path / "whole" / name), strict=True):
            assert mine.pop("loglikelihoods", 0) == pytest.approx(theirs.pop("loglikelihoods", 0), abs=1e-5)
            assert mine.pop("loglikelihood", 0) == pytest.approx(theirs.pop("loglikelihood", 0), abs=1e-4)
            assert mine == theirs
    capsys.readouterr()
    assert main(arguments(run, tmp_path)) == 0
    assert "is complete; nothing is evaluated" in capsys.readouterr().err
    with pytest.raises(EvaluationError, match=r"seed: must be as in .*, is 1"):
        main([*arguments(run, tmp_path), "seed=1"])


def test_comparison_is_paired(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(run, tmp_path, "first")) == 0
    assert main([*arguments(run, tmp_path), f"compare={tmp_path}/first"]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())["comparison"]["tasks"]
    assert found["choice"]["accuracy"]["difference"] == 0
    assert found["choice"]["accuracy"]["p_value"] == 1
    assert "to the other evaluation, p 1 (mcnemar exact)" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="compare: must be the folder of a complete evaluation"):
        main([*arguments(run, tmp_path, "third"), f"compare={tmp_path}"])


def test_shots_are_the_first_questions_and_are_not_asked(run: Path, tmp_path: Path) -> None:
    given = [text for text in arguments(run, tmp_path) if "bits_per_byte" not in text]
    assert main([*given, "tasks=[choice]", "choice.num_shots=1"]) == 0
    assert [sample["id"] for sample in read(tmp_path / "out" / "samples_choice.jsonl")] == ["q1", "q2", "q3"]
    with pytest.raises(EvaluationError, match=r"choice.num_shots: must leave a question .*nearest valid: 3"):
        main([*given, "tasks=[choice]", "choice.num_shots=4", f"out={tmp_path}/other"])


QUESTION = {"id": 1, "context": "a", "choices": ["b", "c"], "answer": 0}


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "line 1: must be a JSON object"),
        ("[1]", "line 1: must be a JSON object, is a list"),
        (b"\xff", "line 1: must be UTF-8, is not at byte 1"),
        (
            {**QUESTION, "answer": 2},
            "answer: must be the number of a choice, from 0 to 1, is a number: 2; nearest valid: 1",
        ),
        ({**QUESTION, "answer": True}, "answer: must be the number of a choice"),
        ({**QUESTION, "choices": []}, "choices: must have at least one item"),
        ({**QUESTION, "choices": ["b", ""]}, r"choices\[1\]: must have text"),
        ({**QUESTION, "choices": ["b", 3]}, r"choices\[1\]: must be a string"),
        ({**QUESTION, "context": None}, "context: must be a string, is null"),
        ({**QUESTION, "id": 1.5}, "id: must be a string with text or a whole number"),
        ({"id": 1, "context": "a", "choices": ["b"]}, "answer: must be given"),
        ({**QUESTION, "choices": ["b", "x" * 5000]}, r"choices\[1\]: must have at most model.max_position_tokens"),
        (json.dumps(QUESTION) + "\n" + json.dumps({**QUESTION, "id": "1"}), "line 2: id: must be unique"),
        ("", "must have at least one line"),
    ],
)
def test_lines_that_are_not_questions_are_rejected(run: Path, tmp_path: Path, line: object, problem: str) -> None:
    text = json.dumps(line) if isinstance(line, dict) else line
    (tmp_path / "c.jsonl").write_bytes(text if isinstance(text, bytes) else str(text).encode())
    with pytest.raises((DataError, EvaluationError), match=problem) as error:
        main([f"ckpt={run}", "tasks=[choice]", f"choice.path={tmp_path}/c.jsonl", f"out={tmp_path}/out"])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["tasks=[]"], "tasks: must name at least one task"),
        (["tasks=[chioce]"], r"tasks\[0\]: must be one of .*did you mean choice"),
        (["tasks=[choice,choice]"], "tasks: must name a task once"),
        (["tasks=[choice]"], "choice.path: a value is needed"),
        (["tasks=[choice]", "choice.path=missing.jsonl"], "choice.path: must be a file"),
        (
            ["tasks=[bits_per_byte]", "bits_per_byte.path=README.md", "bits_per_byte.stride_tokens=0"],
            "stride_tokens: must",
        ),
        (["tasks=[bits_per_byte]", "bits_per_byte.path=Makefile"], "must be a .jsonl, .txt or .md file"),
    ],
)
def test_requests_that_cannot_be_done_are_rejected(
    run: Path, tmp_path: Path, overrides: list[str], problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        main([f"ckpt={run}", f"out={tmp_path}/out", *overrides])
    assert not (tmp_path / "out").exists()


def test_run_and_command_have_the_same_keys_of_tasks() -> None:
    """`conf/evaluation/none.yaml` repeats the groups of all tasks in `conf/evaluate.yaml`."""
    command, training = (
        yaml.safe_load((ROOT / "conf" / name).read_text()) for name in ("evaluate.yaml", "evaluation/none.yaml")
    )
    for name in EVALUATION_TASKS.names():
        assert training.pop(name) == command[name], name
    assert training == {"every_steps": 0, "tasks": []}
