"""Scores of a whole model, ids of requests, the task `reward`, standard errors and paired tests."""

import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from comm.dispatch.local import LocalDispatcher
from data.arithmetic import arithmetic_tokenizer
from data.corpus import DataError
from data.tokenizer import Tokenizer
from evaluation.answers import document_windows, encode_continuation, target_sequence
from evaluation.protocol import ContinuationRequest, DocumentRequest, EvaluationError, Measure
from evaluation.statistics import NoEstimateError, compare, estimate, length_controlled_rate, mcnemar, wilson_interval
from infer.engines.local import LocalModel
from infer.protocol import TargetScores, TargetSequence
from infer.reward import score_answers
from kernels.cross_entropy.reference import greedy_scores
from model.pretrained import load_hf
from model.transformer import Transformer, initialize_weights, named_tensors
from tests.evaluation.stand_ins import evaluate, open_task
from tests.infer.models import make_model
from tests.model.hf_checkpoints import random_tokens, reference_model
from tests.tiny import MODEL


def sequences(vocab_size: int, number: int = 23) -> list[TargetSequence]:
    chance = random.Random(5)
    found = []
    for _ in range(number):
        length = chance.randint(2, 30)
        tokens = tuple(chance.randrange(vocab_size) for _ in range(length))
        found.append(TargetSequence(tokens=tokens, num_targets=chance.randint(1, length - 1)))
    return found


def assert_close(found: list[TargetScores], expected: list[TargetScores], tolerance: float) -> None:
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


DOCUMENTS = ["def f(x):\n    return x + 1\n", "naïve café 🙂 日本語 text"] * 9


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(DOCUMENTS, 320)


@pytest.mark.parametrize(
    ("context", "continuation"),
    [("def f(x):", " return"), ("def f(x): ", "return"), ("", "def"), ("  ", "x"), ("日", "本語"), ("re", "turn x")],
)
def test_context_and_choice_have_the_tokens_of_the_whole(tokenizer: Tokenizer, context: str, continuation: str) -> None:
    before, after = encode_continuation(
        tokenizer, ContinuationRequest(context=context, continuation=continuation, place="")
    )
    assert before[0] == tokenizer.special.bos
    assert after
    whole = tokenizer.prompt(context + continuation)
    assert whole[-len(after) :] == after
    # White space at the end of a context belongs to the choice.
    assert before == tokenizer.prompt(context.rstrip())[: len(before)]


def test_choice_that_merges_with_the_context_has_the_last_token(tokenizer: Tokenizer) -> None:
    # "return" is one token, and so is a beginning of it. The whole has no more tokens than the context.
    context = next("return"[:size] for size in range(5, 0, -1) if len(tokenizer.encode(" " + "return"[:size])) == 1)
    request = ContinuationRequest(context=" " + context, continuation="return"[len(context) :], place="")
    before, after = encode_continuation(tokenizer, request)
    assert (before, after) == ([tokenizer.special.bos], tokenizer.encode(" return"))


def test_long_contexts_lose_their_first_tokens(tokenizer: Tokenizer) -> None:
    request = ContinuationRequest(context=(5, 6, 7, 8, 9), continuation=(1, 2), place="choices[0]")
    sequence, num_dropped = target_sequence(tokenizer, request, 4)
    # Of begin of sentence and five tokens, two and the first token of the choice are inputs with the last one dropped.
    assert (sequence.tokens, sequence.num_targets, num_dropped) == ((7, 8, 9, 1, 2), 2, 3)
    with pytest.raises(EvaluationError, match=r"choices\[0\]: must have at most .*=1 tokens, has 2"):
        target_sequence(tokenizer, request, 1)


@pytest.mark.parametrize(("window", "stride"), [(None, None), (4, None), (4, 1), (5, 3), (100, 7), (1, 1)])
@pytest.mark.parametrize("length", [0, 1, 4, 5, 17])
def test_windows_score_each_token_once(
    tokenizer: Tokenizer, window: int | None, stride: int | None, length: int
) -> None:
    tokens = tuple(range(30, 30 + length))
    windows = list(document_windows(tokenizer, DocumentRequest(text=tokens, window=window, stride=stride), 16))
    scored = [token for each in windows for token in each.tokens[len(each.tokens) - each.num_targets :]]
    assert scored == list(tokens)
    most = min(window or 16, 16)
    for number, each in enumerate(windows):
        assert len(each.tokens) <= most + 1
        assert 1 <= each.num_targets <= (most if number == 0 or stride is None else min(stride, most))
        # Context is as long as it can be: a window begins with the document, or is full.
        assert each.tokens[0] == tokenizer.special.bos or len(each.tokens) == most + 1


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
            assert request.tokens[-1] == tokenizer.special.eos  # type: ignore[union-attr]
            assert record[name] == pytest.approx(score_answers(model, [request.tokens])[0], abs=1e-6)  # type: ignore[union-attr]
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


def test_mean_has_the_usual_standard_error() -> None:
    found = estimate([Measure(value=value) for value in (1.0, 0.0, 1.0, 1.0)])
    assert found.value == 0.75
    assert found.standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / 3))
    assert estimate([Measure(value=3.0)]).standard_error is None
    assert estimate([]).value is None


def test_ratio_weighs_samples() -> None:
    found = estimate([Measure(value=2.0, weight=4.0), Measure(value=9.0, weight=6.0), Measure(value=0.0, weight=0.0)])
    assert found.value == 1.1
    assert found.standard_error == pytest.approx(math.sqrt((2.4**2 + 2.4**2) * 3 / 2) / 10)


def test_mcnemar_is_the_exact_binomial_test() -> None:
    assert mcnemar(0, 0) == 1
    assert mcnemar(5, 5) == 1
    assert mcnemar(1, 8) == pytest.approx(2 * (1 + 9) / 2**9)
    assert mcnemar(8, 1) == mcnemar(1, 8)


def test_binary_measures_are_compared_by_mcnemar() -> None:
    first = [Measure(value=float(at < 14)) for at in range(20)]
    second = [Measure(value=float(at >= 13 or at < 2)) for at in range(20)]
    found = compare(first, second)
    assert (found.test, found.num_samples) == ("mcnemar_exact", 20)
    assert found.difference == pytest.approx(14 / 20 - 9 / 20)
    assert found.p_value == pytest.approx(mcnemar(11, 6))
    differences = [mine.value - other.value for mine, other in zip(first, second, strict=True)]
    assert found.standard_error == pytest.approx(estimate([Measure(value=each) for each in differences]).standard_error)


def test_bootstrap_finds_a_difference_only_if_there_is_one() -> None:
    chance = random.Random(2)
    weights = [chance.randint(100, 900) for _ in range(60)]
    second = [Measure(value=weight * chance.gauss(2, 0.3), weight=weight) for weight in weights]
    better = [Measure(value=each.value - each.weight * chance.gauss(0.1, 0.1), weight=each.weight) for each in second]
    noise = [Measure(value=each.value + each.weight * chance.gauss(0, 0.1), weight=each.weight) for each in second]
    found = compare(better, second)
    assert found.test == "paired_bootstrap"
    assert found.p_value is not None
    assert found.interval is not None
    assert found.p_value < 0.01
    assert found.interval[1] < 0
    assert found == compare(better, second)
    same = compare(noise, second)
    assert same.p_value is not None
    assert same.p_value > 0.05
    assert same.standard_error == pytest.approx(0.1 / math.sqrt(60), rel=0.5)


def test_wilson_interval_is_the_published_one() -> None:
    """81 of 263: Newcombe, 1998, table I."""
    assert wilson_interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0.0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_win_rate_at_equal_lengths_is_that_of_the_model_that_made_the_preferences() -> None:
    """Preferences are the model's own probabilities, so the regression must find its coefficients."""
    differences = [-300, -90, -10, 0, 20, 150, 700, 60] * 5
    scale = float(np.std(differences, ddof=1))
    preferences = [1 / (1 + math.exp(-0.4 - 1.5 * math.tanh(each / scale))) for each in differences]
    rate, low, high = length_controlled_rate(preferences, differences)
    assert rate == pytest.approx(1 / (1 + math.exp(-0.4)), abs=1e-9)
    assert low == pytest.approx(high) == pytest.approx(rate)
    # Symmetric lengths and preferences say nothing about which system is better.
    rate, low, high = length_controlled_rate([1, 0, 1, 0] * 10, [5, -5, -5, 5] * 10)
    assert rate == pytest.approx(0.5)
    assert low < 0.4 < 0.6 < high
    for wins, lengths, reason in (
        ([1, 0], [3, 4], "needs at least 30 pairs, there are 2"),
        ([1] * 40, [3, 4] * 20, "same preference"),
        ([1, 0] * 20, [4] * 40, "same difference"),
        ([1, 0] * 20, [4, -4] * 20, "decides every preference"),
    ):
        with pytest.raises(NoEstimateError, match=reason):
            length_controlled_rate(wins, lengths)
