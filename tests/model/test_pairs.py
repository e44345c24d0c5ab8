"""Preference and ranking objectives in closed form, and scores of sampled tokens."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from data.loader import Batch
from model.config import PolicyLossConfig
from model.objective import CrossEntropy, MicroBatch, Objective, OutputHead
from model.objectives.pairs import MARGIN, PAIR, REFERENCE, SCORE, AnswerValues, PairIndex, PairRanking, Preference
from model.objectives.policy import AnswerIndex, PolicyGradient
from tests.answers import GRPO, draw_answers
from tests.answers import drawn as sampled_drawn
from tests.model.live_memory import LiveMemory
from tests.model.test_policy import gradients
from tests.pairs import batch_of, draw_pairs
from train.tasks.next_token import to_micro_batch

HIDDEN, VOCAB, LENGTH = 5, 11, 40
RANKING = PairRanking(factor=1.0, centre=0.0, balance=0.0)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def micro_batch(batch: Batch, **extras: Tensor) -> MicroBatch:
    made = to_micro_batch(batch, 0, torch.device("cpu"), masks_documents=True, weights_BT=batch.extras["pair"] != 0)
    return replace(made, extras={**made.extras, **extras})


def pairs_batch(seed: int, rows: tuple[int, ...] = (2, 1, 0)) -> Batch:
    """Sequences with several pairs, one pair, and none."""
    drawn_pairs = iter(draw_pairs(seed, sum(rows), VOCAB))
    return batch_of([[next(drawn_pairs) for _ in range(number)] for number in rows], LENGTH)


def rank(batch: MicroBatch, objective: PairRanking = RANKING) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda hidden, weight: objective.loss(hidden, OutputHead(0, weight), batch, None).loss


def by_answer(values_BT: Tensor, numbers_BT: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(sum over the chosen answer, sum over the rejected one) of every pair, by loops."""
    found = []
    for row, numbers in zip(values_BT, numbers_BT, strict=True):
        for number in range(1, int(numbers.max()) + 1):
            found.append((row[numbers == number].sum(), row[numbers == -number].sum()))
    return found


def test_sums_and_spread_are_those_of_loops() -> None:
    seed = 0
    numbers = pairs_batch(seed).extras["pair"]
    values, index = drawn(seed, *numbers.shape), PairIndex.of(numbers)
    sums = index.sums(values)
    expected = torch.tensor(by_answer(values, numbers), dtype=torch.float64)
    found = torch.stack([sums.chosen_BK[index.is_pair_BK], sums.rejected_BK[index.is_pair_BK]], 1)
    assert torch.allclose(found, expected, atol=1e-14)
    assert int(index.is_pair_BK.sum()) == 3
    rising = torch.arange(1.0, LENGTH + 1, dtype=torch.float64).expand(len(numbers), -1)
    assert torch.equal(index.spread(AnswerValues(rising, -rising)), numbers.double())


@pytest.mark.parametrize(("centre", "margin"), [(0.0, 0.0), (0.3, 0.7)])
def test_ranking_is_the_formula_and_its_gradient_that_of_autograd(centre: float, margin: float) -> None:
    batch = pairs_batch(1)
    margins = margin * (batch.extras["score"] > 0).double()
    objective = PairRanking(factor=0.25, centre=centre, balance=0.0)
    hidden, weight = drawn(2, 3, LENGTH, HIDDEN), drawn(3, 1, HIDDEN)

    def formula(hidden: Tensor, weight: Tensor) -> Tensor:
        pairs = by_answer((hidden @ weight.t())[..., 0], batch.extras["score"])
        losses = [-functional.logsigmoid(w - r - margin) + centre * (w + r) ** 2 for w, r in pairs]
        return 0.25 * torch.stack(losses).sum()

    found = gradients(rank(micro_batch(batch, **{MARGIN: margins}), objective), hidden, weight)
    expected = gradients(formula, hidden, weight)
    assert found[2] == pytest.approx(expected[2], rel=1e-13)
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-14)


def prefer(batch: MicroBatch, objective: Preference) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda hidden, weight: objective.loss(hidden, OutputHead(0, weight), batch, None).loss


PREFERENCE = Preference(factor=0.5, beta=0.7, smoothing=0.0, sft=0.0, mtp_factors=(), balance=0.0)


@pytest.mark.parametrize(("smoothing", "sft"), [(0.0, 0.0), (0.2, 0.3)])
def test_preference_is_the_formula_and_its_gradient_that_of_autograd(smoothing: float, sft: float) -> None:
    batch, objective = pairs_batch(6), replace(PREFERENCE, smoothing=smoothing, sft=sft)
    hidden, weight, reference = drawn(7, 3, LENGTH, HIDDEN), drawn(8, VOCAB, HIDDEN), -drawn(9, 3, LENGTH).abs()
    pair, targets = batch.extras["pair"], batch.targets(1).clamp_min(0)

    def formula(hidden: Tensor, weight: Tensor) -> Tensor:
        logs = torch.log_softmax(hidden @ weight.t(), -1).gather(2, targets[..., None])[..., 0]
        ratios, lengths = by_answer(logs - reference, pair), by_answer(torch.ones_like(logs), pair)
        losses = []
        for (w, r), (log_prob, _), (length, _) in zip(ratios, by_answer(logs, pair), lengths, strict=True):
            margin = 0.7 * (w - r)
            losses.append(-(1 - smoothing) * functional.logsigmoid(margin) - smoothing * functional.logsigmoid(-margin))
            losses.append(-sft * log_prob / length)
        return 0.5 * torch.stack(losses).sum()

    found = gradients(prefer(micro_batch(batch, **{REFERENCE: reference}), objective), hidden, weight)
    expected = gradients(formula, hidden, weight)
    assert found[2] == pytest.approx(expected[2], rel=1e-13)
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-13)


def test_preference_of_the_reference_itself_has_margin_zero_and_counts_no_win() -> None:
    batch = pairs_batch(10)
    hidden, weight = drawn(11, 3, LENGTH, HIDDEN), drawn(12, VOCAB, HIDDEN)
    plain = micro_batch(batch, **{REFERENCE: torch.zeros(3, LENGTH, dtype=torch.float64)})
    own = PREFERENCE.loss(hidden, OutputHead(0, weight), plain, None).log_probs_BT
    assert own is not None
    found = PREFERENCE.loss(hidden, OutputHead(0, weight), micro_batch(batch, **{REFERENCE: own}), None)
    assert float(found.sums["margin"]) == 0.0
    assert float(found.sums["accuracy"]) == 0
    assert float(found.sums["main"]) == pytest.approx(3 * math.log(2), rel=1e-14)
    assert not own[batch.extras[PAIR] == 0].any()


def test_a_batch_without_pairs_has_loss_and_gradient_zero() -> None:
    batch = micro_batch(pairs_batch(0, (0, 0)), **{REFERENCE: torch.zeros(2, LENGTH)})
    assert not batch.extras[SCORE].any()
    hidden = drawn(1, 2, LENGTH, HIDDEN)
    for loss, rows in ((rank(batch), 1), (prefer(batch, replace(PREFERENCE, sft=0.2)), VOCAB)):
        grads = gradients(loss, hidden, drawn(2, rows, HIDDEN))
        assert grads[2] == 0
        assert not grads[0].any()
        assert not grads[1].any()


V3_VOCABULARY, NUM_ROWS, SAMPLED_HIDDEN = 129_280, 130, 8
FEW = CrossEntropy(factors=(1.0,), balance=0.0)


def objective(form: PolicyLossConfig) -> PolicyGradient:
    return PolicyGradient(targets=FEW, form=form, factor=1.0, max_new_tokens=NUM_ROWS, temperature=0.6)


def drawn_batch(rows: tuple[int, ...], length: int) -> MicroBatch:
    batch = draw_answers(3, rows, length, 11)
    return to_micro_batch(batch, 0, torch.device("cpu"), masks_documents=True, weights_BT=batch.extras["weights"])


def test_sums_of_answers_are_those_of_loops() -> None:
    batch = drawn_batch((3, 0, 2), 40)
    answer_BT, values_BT = batch.extras["answer"], sampled_drawn(1, 3, 40)
    expected_BT = torch.zeros(3, 40, dtype=torch.float64)
    for row in range(3):
        for number in range(1, int(answer_BT[row].max()) + 1):
            place = answer_BT[row] == number
            expected_BT[row, place] = values_BT[row, place].sum()
    is_answer_BT = answer_BT > 0
    few = batch.rows(0)
    assert few is not None
    for rows in (few, torch.arange(answer_BT.numel())):
        answers = AnswerIndex(batch, rows if rows is few else None)
        values_R, is_answer_R, expected_R = (each.flatten()[rows] for each in (values_BT, is_answer_BT, expected_BT))
        assert torch.allclose(answers.sums(values_R)[is_answer_R], expected_R[is_answer_R], rtol=1e-14)
        assert int(answers.count()) == 5
    cut = replace(batch, targets_BT=(batch.targets_BT[0].masked_fill(answer_BT == 2, -100),))
    assert int(AnswerIndex(cut, None).count()) == 3


def one_answer(*, has_old: bool, has_kept: bool) -> MicroBatch:
    """One sequence that is one answer to V3's vocabulary."""
    shape = (1, NUM_ROWS)
    targets = torch.randint(0, V3_VOCABULARY, shape, generator=torch.Generator().manual_seed(1))
    extras = {
        "answer": torch.ones(shape, dtype=torch.int64),
        "weights": torch.ones(shape),
        "advantage": torch.full(shape, -0.5),
        "sampler_log_probs": torch.full(shape, -11.0),
        "reference_log_probs": torch.full(shape, -12.0),
    }
    if has_old:
        extras["old_log_probs"] = torch.full(shape, -11.5)
    if has_kept:
        extras["kept_ids"] = torch.cat([targets[..., None], torch.arange(49).expand(*shape, 49)], -1)
    return MicroBatch(inputs_BT=(targets,), targets_BT=(targets,), extras=extras)


def peak_bytes(loss: Objective, batch: MicroBatch) -> int:
    """Peak bytes that operators allocate in forward and backward, with gradients and without inputs."""
    hidden = sampled_drawn(1, 1, NUM_ROWS, SAMPLED_HIDDEN).float().requires_grad_()
    weight = torch.full((V3_VOCABULARY, SAMPLED_HIDDEN), 0.01).requires_grad_()
    with LiveMemory() as memory:
        loss.loss(hidden, OutputHead(0, weight), batch, None).loss.backward()
    found: int = memory.peak_bytes
    return found


@pytest.mark.slow
def test_head_of_policy_gradients_takes_as_little_memory_as_that_of_cross_entropy() -> None:
    """Law A7: at most 1.1 times as much, also if the head is computed twice or among kept tokens."""
    plain = peak_bytes(FEW, one_answer(has_old=False, has_kept=False))
    assert plain < 4 * NUM_ROWS * V3_VOCABULARY * 2
    for name, form, has_old, has_kept in (
        ("one sweep", replace(GRPO, kl="reverse", kl_weight=0.1), True, False),
        ("two sweeps", replace(GRPO, ratio="sequence_mean"), True, False),
        ("kept tokens", replace(GRPO, off_policy_limit=0.1), False, True),
    ):
        found = peak_bytes(objective(form), one_answer(has_old=has_old, has_kept=has_kept))
        print(f"{name}: {found / plain:.3f} of {plain / 2**20:.0f} MiB")
        assert found <= 1.1 * plain, name
