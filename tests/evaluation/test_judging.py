"""Tests of evaluations by a judge: majorities in both orders, subsets, win rates, and refusals."""

import json
from pathlib import Path
from typing import Any

import pytest

from data.arithmetic import arithmetic_tokenizer
from evaluation.protocol import EvaluationError
from evaluation.statistics import wilson_interval
from tests.evaluation.stand_ins import SayingModel, evaluate, open_task

TOKENIZER = arithmetic_tokenizer()
KEYS: dict[str, Any] = {
    "mark": "",
    "accept": "1",
    "reject": "2",
    "question": "{prompt}={answer}={other}=",
    "max_new_tokens": 4,
}


def write(path: Path, names: tuple[str, str, str], parts: list[str]) -> str:
    lines = [
        {"id": number, "prompt": "21", names[0]: "12", names[1]: "1", names[2]: part}
        for number, part in enumerate(parts)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_majority_of_both_orders_decides_and_ties_count_half(tmp_path: Path) -> None:
    """Each pair has two votes in each of both orders; in the second order, 2 is for the chosen answer."""
    path = write(tmp_path / "pairs.jsonl", ("chosen", "rejected", "subset"), ["a", "a", "a", "b"])
    said = ["1", "1", "2", "1", "1", "1", "1", "1", "2", "2", "1", "1", "0", "0", "0", "2"]
    opened = open_task("judge", TOKENIZER, 64, path=path, samples=2, temperature=1.0, **KEYS)
    records, result = evaluate(opened, SayingModel(TOKENIZER, said), TOKENIZER, 64)
    assert [record["preference"] for record in records] == [1.0, 0.5, 0.0, 0.5]
    assert [record["is_decided"] for record in records] == [True, True, True, False]
    assert result.estimates["accuracy"].value == 0.5
    assert result.estimates["one_vote"].value == (0.75 + 0.5 + 0 + 0.5) / 4
    subsets = result.details.values["subsets"]
    assert (subsets["a"]["low"], subsets["a"]["high"]) == wilson_interval(0.5, 3)
    assert result.details.values["mean_accuracy_of_subsets"] == 0.5
    assert "1 pairs have too few valid votes, and count half" in result.details.notes


def test_win_rate_is_by_baseline_with_a_reason_for_no_length_control(tmp_path: Path) -> None:
    path = write(tmp_path / "two.jsonl", ("answer_a", "answer_b", "baseline"), ["x", "x", "y"])
    opened = open_task("versus", TOKENIZER, 64, path=path, **KEYS)
    records, result = evaluate(opened, SayingModel(TOKENIZER, ["1", "2", "1", "1", "2", "1"]), TOKENIZER, 64)
    assert result.estimates["win_rate"].value == 0.5
    assert {name: row["rate"] for name, row in result.details.values["baselines"].items()} == {"x": 0.75, "y": 0.0}
    assert records[0]["length_difference"] == 1
    assert result.details.notes[0] == "x: no length-controlled win rate: needs at least 30 pairs, there are 2"


@pytest.mark.parametrize(
    ("keys", "rule"),
    [
        ({"samples": 2}, "judge.temperature: must be above 0 if judge.samples=2"),
        ({"question": "{prompt}"}, "^judge: question must contain {answer}"),
        ({"max_new_tokens": 64}, "^judge: max_new_tokens must be below the judge's 64 positions"),
        ({"thinking": True}, "^judge: thinking must be false"),
    ],
)
def test_a_judge_that_cannot_vote_is_refused(tmp_path: Path, keys: dict, rule: str) -> None:
    path = write(tmp_path / "pairs.jsonl", ("chosen", "rejected", "subset"), ["a"])
    with pytest.raises(EvaluationError, match=rule):
        open_task("judge", TOKENIZER, 64, path=path, **{**KEYS, **keys})
