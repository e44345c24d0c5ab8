"""Tests the data of the viewer: what the journal has, checked and cut to its size."""

import json
from typing import Any

import pytest

from data.arithmetic.source import arithmetic_tokenizer
from train.report.elements import embedded_json
from train.report.journals import JournalGroup
from train.report.viewer import TokenPieces, answer_data, group_data, shorten

PIECES = TokenPieces(arithmetic_tokenizer())
SAMPLE = {
    "sample": 0,
    "tokens": [19, 20, 1],
    "text": "01",
    "finish": "stop",
    "outcome": "correct",
    "parts": {"exact": {"value": 1.0, "outcome": "correct", "detail": "01"}},
    "reward": 1.0,
    "advantage": 0.77459666,
    "version": 3,
}


def group_of(**values: Any) -> JournalGroup:
    known = {"prompt": 7, "problem": "10=", "text": "10=", "answer": "01", "dropped": "", "samples": [SAMPLE, SAMPLE]}
    log_probs = values.pop("log_probs", [[-0.5, -1.0, -0.123456]] * 2)
    return JournalGroup(step=4, rollout=3, values={**known, **values}, log_probs=log_probs)


def test_group_has_tokens_rewards_parts_and_statistics() -> None:
    wrong = {**SAMPLE, "outcome": "wrong", "reward": 0.0}
    found = group_data(group_of(samples=[SAMPLE, wrong]), PIECES, 10_000)
    assert (found["step"], found["prompt"], found["text"], found["expected"]) == (4, 7, "10=", "01")
    assert found["stats"] == {"answers": 2, "correct": 1, "mean": 0.5, "least": 0.0, "most": 1.0, "tokens": 3.0}
    first = found["answers"][0]
    assert first["pieces"] == ["0", "1", arithmetic_tokenizer().token_names["eos_token"]]
    assert first["logs"] == [-0.5, -1.0, -0.1235]
    assert (first["reward"], first["advantage"], first["outcome"], first["count"]) == (1.0, 0.7746, "correct", 3)
    assert first["parts"] == [["exact", 1.0, "correct", "01"]]


def test_answer_without_tokenizer_or_log_probabilities_is_shown() -> None:
    found = group_data(group_of(log_probs=None), None, 10_000)["answers"][0]
    assert found["text"] == "01"
    assert "pieces" not in found
    assert "logs" not in group_data(group_of(log_probs=None), PIECES, 10_000)["answers"][0]


@pytest.mark.parametrize("count", [2_000, 300_000])
def test_long_answer_loses_its_middle(count: int) -> None:
    ids = [19 + place % 10 for place in range(count)]
    logs = [float(-place) for place in range(count)]
    found = answer_data({**SAMPLE, "tokens": ids}, logs, PIECES, 4_000)
    assert len(embedded_json(found).encode()) < 4_500
    at, left_out = found["cut"]
    assert len(found["pieces"]) == len(found["logs"]) == count - left_out
    head, tail = found["pieces"][:at], found["pieces"][at:]
    assert len(head) > 2 * len(tail) > 20
    assert "".join(head) == ("0123456789" * count)[: len(head)]
    assert "".join(tail) == ("0123456789" * (count // 10))[-len(tail) :]
    assert found["logs"][at - 1] == 1 - at
    assert found["logs"][-1] == pytest.approx(1 - count, rel=1e-3)


@pytest.mark.parametrize("text", ["a" * 10**6, "<" * 10**6, "\0" * 10**5, "\u6f22" * 10**5, "\ud800" * 10**5, "abc"])
def test_shortened_text_fits(text: str) -> None:
    short = shorten(text, 500)
    assert len(embedded_json(short).encode()) < 600
    assert short == text or (text.startswith(short[:20]) and text.endswith(short[-10:]))


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"samples": None},
        {"samples": [None, 3, {}, [SAMPLE]], "log_probs": None},
        {"samples": [{**SAMPLE, "tokens": [-1, 2**70, True, "a"]}], "log_probs": None},
        {"samples": [{**SAMPLE, "reward": float("nan"), "advantage": 10**400, "parts": [1]}], "log_probs": None},
        {"samples": [{**SAMPLE, "parts": {"<b>" * 99: {"value": "x", "detail": 3}, "b": 4}}], "log_probs": [[0, 1, 2]]},
        {"samples": [{**SAMPLE, "outcome": "x" * 10**6, "finish": None}] * 300, "log_probs": [[-1.0] * 3] * 300},
        {"samples": [SAMPLE], "log_probs": [[float("nan"), float("-inf"), 0.0]]},
        {"text": "<" * 10**6, "problem": ["a"], "answer": 3, "prompt": 1e300, "dropped": "\0" * 10**6},
    ],
)
def test_values_of_another_form_are_left_out(values: dict[str, Any]) -> None:
    text = embedded_json(group_data(group_of(**values), PIECES, 20_000))
    json.loads(text, parse_constant=pytest.fail)
    assert len(text) < 30_000
    assert "<" not in text
