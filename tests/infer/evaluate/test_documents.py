"""Tests of the task `reward`: scores are those of the reward model, and accuracy counts pairs by subset."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from comm.dispatch.local import LocalDispatcher
from data.arithmetic import arithmetic_tokenizer
from data.corpus import DataError
from infer.evaluate.local import LocalModel
from infer.evaluate.protocol import EvaluationError
from infer.reward import score_answers
from model.transformer import Transformer, initialize_weights, named_tensors
from tests.infer.evaluate.stand_ins import evaluate, open_task
from tests.tiny import MODEL

PAIRS = [
    {"id": 1, "subset": "sort", "prompt": "21=", "chosen": "12", "rejected": "21"},
    {"id": 2, "subset": "sort", "prompt": "31=", "chosen": "13", "rejected": "3"},
    {"id": 3, "subset": "reverse", "messages": [{"role": "user", "content": "=12"}], "chosen": "21", "rejected": "1"},
    {"id": "d", "prompt": "=13", "chosen": "31", "rejected": "13"},
]


class Rated:
    """A model whose scores are given, in the order of the answers."""

    def __init__(self, scores: Sequence[float]) -> None:
        self.scores = list(scores)

    def rate(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        assert len(sequences) == len(self.scores)
        return self.scores


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    return path


def test_reward_accuracy_is_by_subset_and_ties_count_half(path: Path) -> None:
    tokenizer = arithmetic_tokenizer()
    opened = open_task("reward", tokenizer, 64, path=str(path))
    _, result = evaluate(opened, Rated([1, 0, 0, 2, 3, 3, 5, 4]), tokenizer, 64)
    assert result.estimates["accuracy"].value == (1 + 0 + 0.5 + 1) / 4
    assert result.estimates["margin"].value == (1 - 2 + 0 + 1) / 4
    subsets = result.details.values["subsets"]
    assert {name: each["accuracy"] for name, each in subsets.items()} == {"all": 1.0, "reverse": 0.5, "sort": 0.5}
    assert subsets["sort"]["standard_error"] == pytest.approx(0.5)
    assert result.details.values["mean_accuracy_of_subsets"] == pytest.approx(2 / 3)


def test_reward_scores_are_those_of_the_last_token(path: Path) -> None:
    tokenizer = arithmetic_tokenizer()
    model = Transformer(
        replace(MODEL, head="score", mtp_depth=0), LocalDispatcher(MODEL.num_routed_experts), torch.float32
    )
    initialize_weights(model, 3)
    named_tensors(model)["score.weight"].normal_(0.0, 0.2, generator=torch.Generator().manual_seed(4))
    opened = open_task("reward", tokenizer, 64, path=str(path))
    records, _ = evaluate(opened, LocalModel(model, 3), tokenizer, 64)
    for sample, record in zip(opened.task.samples(), records, strict=True):
        for name, request in zip(("chosen", "rejected"), sample.requests, strict=True):
            assert request.tokens[-1] == tokenizer.end_of_sentence_id
            assert record[name] == pytest.approx(score_answers(model, [request.tokens])[0], abs=1e-6)
    assert len({record["chosen"] for record in records}) == 4


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ({"id": 1, "prompt": "a", "chosen": "b"}, "line 1: rejected: must be given"),
        ({"id": 1, "prompt": "a", "chosen": "b", "rejected": "b"}, "line 1: rejected: must differ from chosen"),
        ({"id": 1, "subset": 3, "prompt": "a", "chosen": "b", "rejected": "c"}, "line 1: subset: must be"),
        ({"id": 1, "prompt": "a", "chosen": "1" * 70, "rejected": "c"}, "line 1: must have at most .* with chosen"),
    ],
)
def test_reward_rejects_what_is_not_valid(tmp_path: Path, line: dict, rule: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises((EvaluationError, DataError), match=rule):
        open_task("reward", arithmetic_tokenizer(), 64, path=str(path))
