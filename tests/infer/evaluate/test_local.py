"""Tests of scores of a whole model: equal to transformers, and independent of batches and of the order."""

import random
from pathlib import Path

import pytest
import torch

from infer.evaluate.local import LocalModel
from infer.evaluate.protocol import TargetScores, TargetSequence
from kernels.cross_entropy.reference import greedy_scores
from model.hf.convert import load_hf
from tests.infer.models import make_model
from tests.model.hf_checkpoints import random_tokens, reference_model


def sequences(vocab_size: int, number: int = 23) -> list[TargetSequence]:
    """Returns sequences of many lengths."""
    chance = random.Random(5)
    found = []
    for _ in range(number):
        length = chance.randint(2, 30)
        tokens = tuple(chance.randrange(vocab_size) for _ in range(length))
        found.append(TargetSequence(tokens=tokens, num_targets=chance.randint(1, length - 1)))
    return found


def assert_close(found: list[TargetScores], expected: list[TargetScores], tolerance: float) -> None:
    """Compares scores."""
    assert [len(each.log_probs) for each in found] == [len(each.log_probs) for each in expected]
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.log_probs == pytest.approx(theirs.log_probs, abs=tolerance)
        assert mine.are_greedy == theirs.are_greedy


@torch.no_grad()
def test_scores_are_those_of_transformers(tmp_path: Path) -> None:
    reference = reference_model(3)
    reference.save_pretrained(tmp_path)
    model = load_hf(tmp_path, torch.float32, drop_mtp=True)
    given = [TargetSequence(tokens=tuple(random_tokens(1, 20)[0].tolist()), num_targets=13)]
    given += sequences(model.config.vocab_size)
    for each, scores in zip(given, LocalModel(model, 7).score(given), strict=True):
        logs_TV = reference(torch.tensor([each.tokens[:-1]])).logits[0].log_softmax(-1)[-each.num_targets :]
        targets = torch.tensor(each.tokens[-each.num_targets :])
        expected = logs_TV.gather(1, targets[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(scores.log_probs), expected, atol=1e-5, rtol=0)
        assert scores.are_greedy == tuple((logs_TV.argmax(-1) == targets).tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batch_size_and_order_change_nothing(dtype: torch.dtype) -> None:
    model = make_model(dtype=dtype)
    given = sequences(model.config.vocab_size)
    expected = LocalModel(model, 1).score(given)
    for batch_size in (2, 5, 64):
        assert_close(LocalModel(model, batch_size).score(given), expected, 1e-5 if dtype == torch.float32 else 1e-11)
    assert_close(LocalModel(model, 4).score(given[::-1])[::-1], expected, 1e-5)


def test_greedy_is_the_first_of_equal_logits_and_ignored_rows_have_no_score() -> None:
    rows_ND, head_VD = torch.tensor([[1.0, 0.0]] * 4), torch.tensor([[0.0, 1.0], [2.0, 0.0], [2.0, 3.0], [1.0, 0.0]])
    log_probs_N, are_greedy_N = greedy_scores(rows_ND, head_VD, torch.tensor([1, 2, 3, -100]))
    assert are_greedy_N.tolist() == [True, False, False, False]
    expected = torch.log_softmax(torch.tensor([0.0, 2.0, 2.0, 1.0]), -1)[[1, 2, 3]].tolist()
    assert log_probs_N.tolist() == pytest.approx([*expected, 0.0])
