"""The policy-gradient objective by loops over answers."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from kernels.cross_entropy import linear_cross_entropy
from kernels.cross_entropy.reference import RowScores
from model.config import PolicyLossConfig
from model.objective import CrossEntropy, MicroBatch, OutputHead, TaskLoss
from model.objectives.policy import AnswerTokens, PolicyGradient, TokenLogProbs, policy_names, policy_terms
from tests.answers import GRPO, VARIANTS, draw_answers, drawn, plain_answers, plain_loss
from train.tasks.next_token import to_micro_batch

HIDDEN, VOCAB, LENGTH, LONGEST = 5, 11, 40, 6
ROWS = (4, 2, 0)

FORMS = {
    **VARIANTS,
    "two-sided": replace(GRPO, largest_ratio=1.5),
    "open": replace(GRPO, clip_low=None, clip_high=None, kl="reverse_squared", kl_weight=0.05),
    "truncated": replace(GRPO, sampler_ratio_cap=1.3, kl="forward", kl_weight=0.05),
    "masked product": replace(GRPO, ratio="sequence_product", off_policy_limit=0.0, sampler_ratio_cap=1.1),
    "weighted mean": replace(GRPO, surrogate="weighted", ratio="sequence_mean", largest_ratio=1.1),
}


def micro_batch(**extras: Tensor) -> MicroBatch:
    batch = draw_answers(0, ROWS, LENGTH, VOCAB)
    made = to_micro_batch(batch, 0, torch.device("cpu"), masks_documents=True, weights_BT=batch.extras["weights"])
    return replace(made, extras={**made.extras, **extras})


def objective_of(form: PolicyLossConfig, temperature: float = 1.0) -> PolicyGradient:
    """The objective of `micro_batch` alone."""
    answers = sum(ROWS)
    tokens = int(micro_batch().extras["weights"].sum())
    return PolicyGradient(
        targets=CrossEntropy(factors=(1.0,), balance=0.0),
        form=form,
        factor=1 / (tokens if form.normalizer == "tokens" else answers),
        max_new_tokens=LONGEST,
        temperature=temperature,
    )


def whole_log_probs(hidden: Tensor, weight: Tensor, batch: MicroBatch, temperature: float = 1.0) -> Tensor:
    """Log-probabilities from whole logits, among the kept tokens if the batch has them."""
    logits = hidden @ weight.t() / temperature
    kept = batch.extras.get("kept_ids")
    if kept is not None:
        is_kept = (kept[..., None] == torch.arange(len(weight))).any(2) | (kept < 0).all(2)[..., None]
        logits = logits.masked_fill(~is_kept, float("-inf"))
    return torch.log_softmax(logits, -1).gather(2, batch.targets_BT[0].clamp_min(0)[..., None])[..., 0]


def gradients(loss: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, float]:
    """Gradients in the states and the head's matrix, and the loss."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    value = loss(hidden, weight)
    value.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return hidden.grad, weight.grad, float(value.detach())


def apply(objective: PolicyGradient, hidden: Tensor, weight: Tensor, batch: MicroBatch) -> TaskLoss:
    return objective.loss(hidden, OutputHead(0, weight), batch, None)


def policy_gradients(
    objective: PolicyGradient, hidden: Tensor, weight: Tensor, batch: MicroBatch
) -> tuple[Tensor, Tensor, float]:
    """Gradients of the objective in the states and the head's matrix, and the loss."""
    return gradients(lambda rows, head: apply(objective, rows, head, batch).loss, hidden, weight)


def near_policy(hidden: Tensor, weight: Tensor, batch: MicroBatch, temperature: float = 1.0) -> dict[str, Tensor]:
    """Log-probabilities of three other models, near those of the policy: ratios on both sides of every clip."""
    own = whole_log_probs(hidden, weight, batch, temperature).detach()
    names, scales = ("old_log_probs", "reference_log_probs", "sampler_log_probs"), (0.4, 0.5, 0.3)
    noise = (drawn(30 + place, *own.shape) for place in range(3))
    return {name: own + scale * each for name, scale, each in zip(names, scales, noise, strict=True)}


@pytest.mark.parametrize(("has_old", "temperature"), [(False, 1.0), (True, 0.6)])
@pytest.mark.parametrize("name", FORMS)
def test_policy_loss_is_its_definition_and_its_gradient_that_of_autograd(
    name: str, has_old: bool, temperature: float
) -> None:
    form = replace(FORMS[name], kl_weight=FORMS[name].kl_weight * 10)
    hidden, weight = drawn(1, len(ROWS), LENGTH, HIDDEN), drawn(2, VOCAB, HIDDEN)
    others = near_policy(hidden, weight, micro_batch(), temperature)
    batch = micro_batch(**{name: each for name, each in others.items() if has_old or name != "old_log_probs"})

    def formula(hidden: Tensor, weight: Tensor) -> Tensor:
        log_probs = whole_log_probs(hidden, weight, batch, temperature)
        return plain_loss(form, list(plain_answers(log_probs, dict(batch.extras))), LONGEST)

    found = policy_gradients(objective_of(form, temperature), hidden, weight, batch)
    expected = gradients(formula, hidden, weight)
    assert found[2] == pytest.approx(expected[2], rel=1e-12, abs=1e-14)
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        assert float(theirs.abs().max()) > 1e-3
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-13)
    with torch.no_grad():
        unrecorded = apply(objective_of(form, temperature), hidden, weight, batch)
    assert float(unrecorded.loss) == pytest.approx(expected[2], rel=1e-12, abs=1e-14)


def test_loss_v3_is_equations_26_to_28_of_its_report() -> None:
    """Written with probabilities of whole answers; advantages are those of the batch."""
    form = replace(FORMS["v3"], kl_weight=0.05)
    hidden, weight = drawn(1, len(ROWS), LENGTH, HIDDEN), drawn(2, VOCAB, HIDDEN)
    batch = micro_batch(**near_policy(hidden, weight, micro_batch()))

    def report(hidden: Tensor, weight: Tensor) -> Tensor:
        objective = torch.zeros((), dtype=torch.float64)
        answers = list(plain_answers(whole_log_probs(hidden, weight, batch), dict(batch.extras)))
        for answer in answers:
            assert answer.old is not None
            assert answer.reference is not None
            policy, old, reference = (each.exp().prod() for each in (answer.log_probs, answer.old, answer.reference))
            ratio, q = policy / old, reference / policy
            surrogate = torch.minimum(ratio * answer.advantage, ratio.clamp(0.8, 1.2) * answer.advantage)
            objective = objective + surrogate - 0.05 * (q - q.log() - 1)
        return -objective / len(answers)

    found = policy_gradients(objective_of(form), hidden, weight, batch)
    expected = gradients(report, hidden, weight)
    assert found[2] == pytest.approx(expected[2], rel=1e-10)
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", FORMS)
def test_answers_without_advantage_give_gradients_of_exactly_zero(name: str) -> None:
    """Even if the other models are so far away that their ratios are bounded."""
    form = replace(FORMS[name], kl_weight=0.0)
    hidden, weight = drawn(1, len(ROWS), LENGTH, HIDDEN), drawn(2, VOCAB, HIDDEN)
    far = {name: 1000 * each for name, each in near_policy(hidden, weight, micro_batch()).items()}
    batch = micro_batch(advantage=torch.zeros(len(ROWS), LENGTH), **far)
    *found, loss = policy_gradients(objective_of(form), hidden, weight, batch)
    assert loss == 0
    for gradient in found:
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("name", FORMS)
def test_ratios_and_divergences_without_bounds_overflow_nothing(name: str) -> None:
    form = replace(FORMS[name], kl_weight=0.1)
    hidden, weight = drawn(1, len(ROWS), LENGTH, HIDDEN), drawn(2, VOCAB, HIDDEN)
    far = {name: 1000 * each for name, each in near_policy(hidden, weight, micro_batch()).items()}
    found = policy_gradients(objective_of(form), hidden, weight, micro_batch(**far))
    assert all(each.isfinite().all() for each in found[:2])
    assert math.isfinite(found[2])


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FORMS)
def test_policy_that_is_the_old_one_has_ratio_one_to_the_bit(name: str, dtype: torch.dtype) -> None:
    """The old log-probabilities of a forward-only pass, or none, give the same bits."""
    objective = objective_of(FORMS[name], 0.6)
    hidden, weight = drawn(1, len(ROWS), LENGTH, HIDDEN).to(dtype), drawn(2, VOCAB, HIDDEN).to(dtype)
    others = near_policy(hidden.double(), weight.double(), micro_batch(), 0.6)
    del others["old_log_probs"]
    kept = some_kept(micro_batch())
    without = micro_batch(kept_ids=kept, **others)
    old = TokenLogProbs(temperature=0.6).loss(hidden, OutputHead(0, weight), without, None).log_probs_BT
    assert old is not None
    found = []
    for batch in (without, replace(without, extras={**without.extras, "old_log_probs": old})):
        sums = apply(objective, hidden, weight, batch).sums
        assert (float(sums["ratio_deviation"]), float(sums["clip_fraction"])) == (0, 0)
        found.append(policy_gradients(objective, hidden, weight, batch))
    for first, second in zip(*found, strict=True):
        assert torch.equal(torch.as_tensor(first), torch.as_tensor(second))


def some_kept(batch: MicroBatch) -> Tensor:
    """Drawn kept tokens of each position, the sampled one among them; every fourth position keeps all."""
    kept = drawn(40, len(ROWS), LENGTH, VOCAB).argsort(2)[..., :5].clone()
    kept[..., 0] = batch.targets_BT[0].clamp_min(0)
    kept[:, ::3, 3:] = -1
    kept[:, ::4] = -1
    return kept


@pytest.mark.parametrize("name", ["dapo", "gspo", "v3_2"])
def test_kept_tokens_and_temperature_are_those_of_the_sampler(name: str) -> None:
    form, temperature = FORMS[name], 1.5
    hidden, weight = drawn(1, len(ROWS), LENGTH, HIDDEN), drawn(2, VOCAB, HIDDEN)
    kept = some_kept(micro_batch())
    others = near_policy(hidden, weight, micro_batch(kept_ids=kept), temperature)
    batch = micro_batch(kept_ids=kept, **others)
    is_target = batch.targets_BT[0] != -100
    expected_BT = whole_log_probs(hidden, weight, batch, temperature)
    for rows in (batch.target_rows, ()):
        scored = replace(batch, target_rows=rows)
        recorded = TokenLogProbs(temperature=temperature).loss(hidden, OutputHead(0, weight), scored, None)
        assert recorded.log_probs_BT is not None
        assert torch.allclose(recorded.log_probs_BT[is_target], expected_BT[is_target], rtol=1e-12, atol=1e-12)
        assert not recorded.log_probs_BT[~is_target].any()
    assert float((expected_BT - whole_log_probs(hidden, weight, micro_batch()))[is_target].abs().max()) > 0.1

    def formula(hidden: Tensor, weight: Tensor) -> Tensor:
        log_probs = whole_log_probs(hidden, weight, batch, temperature)
        return plain_loss(form, list(plain_answers(log_probs, dict(batch.extras))), LONGEST)

    objective = objective_of(form, temperature)
    found = policy_gradients(objective, hidden, weight, batch)
    for ours, theirs in zip(found[:2], gradients(formula, hidden, weight)[:2], strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-13)


def test_head_that_reads_all_rows_gives_the_same() -> None:
    hidden, weight = drawn(1, len(ROWS), LENGTH, HIDDEN), drawn(2, VOCAB, HIDDEN)
    batch = micro_batch(**near_policy(hidden, weight, micro_batch()))
    assert batch.rows(0) is not None
    for form in (FORMS["v3_2"], FORMS["gspo"], FORMS["v3"]):
        objective = objective_of(form)
        few, all_rows = (
            policy_gradients(objective, hidden, weight, each) for each in (batch, replace(batch, target_rows=()))
        )
        for ours, theirs in zip(few[:2], all_rows[:2], strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-14)
        sums = [apply(objective, hidden, weight, each).sums for each in (batch, replace(batch, target_rows=()))]
        for name in sums[0]:
            assert float(sums[0][name]) == pytest.approx(float(sums[1][name]), rel=1e-12)


def test_head_is_computed_twice_only_if_slopes_depend_on_whole_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []

    def counted(*operands: Any, wants_rows: bool, wants_head: bool, kept_ids_NK: Tensor | None) -> RowScores:
        calls.append(wants_rows)
        return linear_cross_entropy(*operands, wants_rows=wants_rows, wants_head=wants_head, kept_ids_NK=kept_ids_NK)

    monkeypatch.setattr("model.objectives.policy.linear_cross_entropy", counted)
    hidden, weight = drawn(1, len(ROWS), LENGTH, HIDDEN).requires_grad_(), drawn(2, VOCAB, HIDDEN)
    others = near_policy(hidden.detach(), weight, micro_batch())
    sweeps: dict[tuple[str, bool], list[bool]] = {}
    for name, has_old in product(VARIANTS, (True, False)):
        calls.clear()
        given = {each: value for each, value in others.items() if has_old or each != "old_log_probs"}
        apply(objective_of(VARIANTS[name]), hidden, weight, micro_batch(**given))
        sweeps[name, has_old] = list(calls)
    twice = {("gspo", True), ("v3", True), ("v3", False), ("v3_2", True), ("v3_2", False)}
    assert sweeps == {key: [False, True] if key in twice else [True] for key in sweeps}


def test_reported_sums_are_those_of_loops() -> None:
    form = replace(FORMS["v3_2"], off_policy_limit=0.0, largest_ratio=1.4)
    hidden, weight = drawn(1, len(ROWS), LENGTH, HIDDEN), drawn(2, VOCAB, HIDDEN)
    batch = micro_batch(**near_policy(hidden, weight, micro_batch()))
    sums = {name: float(each) for name, each in apply(objective_of(form), hidden, weight, batch).sums.items()}
    expected = dict.fromkeys(sums, 0.0)
    answers = list(plain_answers(whole_log_probs(hidden, weight, batch), dict(batch.extras)))
    for answer in answers:
        assert answer.old is not None
        assert answer.reference is not None
        apart = float((answer.sampler - answer.log_probs).mean())
        expected["off_policy_share"] += float(answer.advantage < 0 and apart > 0)
        for own, old, reference, sampler in zip(
            answer.log_probs.tolist(),
            answer.old.tolist(),
            answer.reference.tolist(),
            answer.sampler.tolist(),
            strict=True,
        ):
            ratio, log_q = math.exp(own - old), reference - own
            is_clipped = ratio > 1.2 if answer.advantage > 0 else not 0.8 <= ratio <= 1.4
            expected["kl"] += ratio * (math.exp(log_q) - log_q - 1)
            expected["entropy"] -= own
            expected["clip_fraction"] += is_clipped
            expected["ratio_deviation"] += abs(ratio - 1)
            expected["sampler_difference"] += abs(old - sampler)
    expected["main"] = float(plain_loss(form, answers, LONGEST)) * len(answers)
    assert 0 < expected["off_policy_share"] < len(answers)
    assert set(sums) == set(policy_names(0, has_reference=True)) - {"balance"}
    assert sums == pytest.approx(expected, rel=1e-12)


NUM_ACTIONS = 6
LOGITS, OLD_LOGITS, REFERENCE_LOGITS = (drawn(seed, NUM_ACTIONS) for seed in (1, 2, 3))


def divergence(logits_A: Tensor, *, reverse: bool) -> Tensor:
    """Returns KL(policy || reference) if `reverse`, else KL(reference || policy)."""
    own_A, reference_A = logits_A.log_softmax(0), REFERENCE_LOGITS.log_softmax(0)
    first_A, second_A = (own_A, reference_A) if reverse else (reference_A, own_A)
    return (first_A.exp() * (first_A - second_A)).sum()


@pytest.mark.parametrize(
    ("kind", "has_old", "is_reverse"),
    [("reverse", False, True), ("reverse", True, True), ("reverse_squared", False, True), ("forward", False, False)],
)
def test_estimators_of_a_divergence_are_unbiased(
    kind: Literal["reverse", "reverse_squared", "forward"], has_old: bool, is_reverse: bool
) -> None:
    """A bandit: every action is an answer, weighted by its probability under the policy that sampled it."""
    actions_A, ones_A = torch.arange(NUM_ACTIONS), torch.ones(NUM_ACTIONS, dtype=torch.float64)
    old_A = OLD_LOGITS.log_softmax(0)
    tokens = AnswerTokens(
        advantage_R=0 * ones_A,
        weight_R=(OLD_LOGITS if has_old else LOGITS).softmax(0),
        is_token_R=ones_A,
        length_R=ones_A,
        sampler_R=old_A,
        old_R=old_A if has_old else None,
        reference_R=REFERENCE_LOGITS.log_softmax(0),
    )
    terms = policy_terms(replace(GRPO, kl=kind, kl_weight=1.0), tokens, LOGITS.log_softmax(0))
    picked_AA = torch.nn.functional.one_hot(actions_A, NUM_ACTIONS)
    made_A = (terms.slopes_R[:, None] * (LOGITS.softmax(0) - picked_AA)).sum(0)
    logits_A = LOGITS.clone().requires_grad_()
    (expected_A,) = torch.autograd.grad(divergence(logits_A, reverse=is_reverse), logits_A)
    assert torch.allclose(made_A, expected_A, rtol=1e-12, atol=1e-14)


def test_share_of_a_product_is_divided_over_its_tokens_and_its_slope_is_not() -> None:
    """The surrogate of an answer of n tokens is ratio * A once; its derivative in each log p is ratio * A."""
    ratio, advantage, length = 1.1, 0.5, 4
    full = torch.full((length,), 1.0, dtype=torch.float64)
    tokens = AnswerTokens(
        advantage_R=advantage * full,
        weight_R=full,
        is_token_R=full,
        length_R=length * full,
        sampler_R=-full,
        old_R=-full,
        reference_R=None,
        ratio_R=ratio * full,
    )
    form = replace(GRPO, ratio="sequence_product", normalizer="sums")
    terms = policy_terms(form, tokens, -full)
    assert float(terms.sums["main"]) == pytest.approx(-ratio * advantage, rel=1e-14)
    assert torch.allclose(terms.slopes_R, ratio * advantage * full, rtol=1e-14)
