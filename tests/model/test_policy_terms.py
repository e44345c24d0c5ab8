"""Policy gradients on a bandit: closed forms with active clips, and estimators of the divergence by enumeration.

A bandit is one softmax over A actions. Shape legend: A actions, R draws.
"""

import math
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from model.objectives.policy_loss import PolicyLossConfig
from model.objectives.policy_terms import AnswerTokens, policy_terms
from tests.answers import GRPO, drawn

NUM_ACTIONS = 6
LOGITS, OLD_LOGITS, REFERENCE_LOGITS = (drawn(seed, NUM_ACTIONS) for seed in (1, 2, 3))
KlKind = Literal["reverse", "reverse_squared", "forward", "none"]


def tokens_of(
    actions_R: Tensor, advantage_R: Tensor, *, has_old: bool, weight_R: Tensor | None = None, near: float = 1.0
) -> AnswerTokens:
    """Draws as answers of one token. `near`: how near the reference is."""
    ones_R = torch.ones(len(actions_R), dtype=torch.float64)
    old_R = OLD_LOGITS.log_softmax(0)[actions_R]
    reference_A = (LOGITS + near * (REFERENCE_LOGITS - LOGITS)).log_softmax(0)
    return AnswerTokens(
        advantage_R=advantage_R,
        weight_R=ones_R if weight_R is None else weight_R,
        is_token_R=ones_R,
        length_R=ones_R,
        sampler_R=old_R,
        old_R=old_R if has_old else None,
        reference_R=reference_A[actions_R],
    )


def gradient(form: PolicyLossConfig, tokens: AnswerTokens, actions_R: Tensor) -> Tensor:
    """The gradient in the logits, A: slopes times the softmax's Jacobian."""
    slopes_R = policy_terms(form, tokens, LOGITS.log_softmax(0)[actions_R]).slopes_R
    picked_RA = torch.nn.functional.one_hot(actions_R, NUM_ACTIONS)
    return (slopes_R[:, None] * (LOGITS.softmax(0) - picked_RA)).sum(0)


def closed_slope(kind: KlKind, beta: float, ratio: float, advantage: float, log_q: float) -> float:
    """Derivative of a token's loss in log p, by the published formulas."""
    is_clipped = (advantage > 0 and ratio > 1.28) or (advantage < 0 and ratio < 0.8)
    divergence = {"none": 0.0, "reverse_squared": -log_q, "forward": 1 - math.exp(log_q), "reverse": -ratio * log_q}
    return -(0.0 if is_clipped else ratio * advantage) + beta * divergence[kind]


@pytest.mark.parametrize("kind", ["reverse", "reverse_squared", "forward", "none"])
def test_slopes_on_a_bandit_are_the_closed_form_with_clips_on_both_sides(kind: KlKind) -> None:
    form, beta = replace(GRPO, clip_high=0.28, kl=kind, kl_weight=0.7), 0.7
    actions_R = torch.arange(NUM_ACTIONS).repeat(2)
    advantage_R = torch.tensor([1.5] * NUM_ACTIONS + [-0.7] * NUM_ACTIONS, dtype=torch.float64)
    weight_R = drawn(4, 2 * NUM_ACTIONS).abs()
    tokens = tokens_of(actions_R, advantage_R, has_old=True, weight_R=weight_R)
    expected, own_A = torch.zeros(NUM_ACTIONS, dtype=torch.float64), LOGITS.softmax(0)
    log_probs = [logits.log_softmax(0).tolist() for logits in (LOGITS, OLD_LOGITS, REFERENCE_LOGITS)]
    ratios = [math.exp(own - old) for own, old in zip(*log_probs[:2], strict=True)]
    assert any(ratio > 1.28 for ratio in ratios)
    assert any(ratio < 0.8 for ratio in ratios)
    assert any(0.8 < ratio < 1.28 for ratio in ratios)
    for action, advantage, weight in zip(actions_R.tolist(), advantage_R.tolist(), weight_R.tolist(), strict=True):
        log_q = log_probs[2][action] - log_probs[0][action]
        slope = weight * closed_slope(kind, beta, ratios[action], advantage, log_q)
        picked_A = torch.nn.functional.one_hot(torch.tensor(action), NUM_ACTIONS)
        expected += slope * (picked_A - own_A)
    assert torch.allclose(gradient(form, tokens, actions_R), expected, rtol=1e-12, atol=1e-14)


def divergence_gradient(*, reverse: bool) -> Tensor:
    """The gradient of KL(policy || reference) if `reverse`, else of KL(reference || policy), A."""
    logits_A = LOGITS.clone().requires_grad_()
    own_A, reference_A = logits_A.log_softmax(0), REFERENCE_LOGITS.log_softmax(0)
    first_A, second_A = (own_A, reference_A) if reverse else (reference_A, own_A)
    (first_A.exp() * (first_A - second_A)).sum().backward()
    assert logits_A.grad is not None
    return logits_A.grad


@pytest.mark.parametrize(
    ("kind", "has_old", "is_reverse"),
    [
        ("reverse", False, True),
        ("reverse", True, True),
        ("reverse_squared", False, True),
        ("forward", False, False),
    ],
)
def test_expected_gradient_of_an_estimator_is_that_of_its_divergence(
    kind: KlKind, has_old: bool, is_reverse: bool
) -> None:
    """Every action, weighted by its probability under what sampled it; with ratios also if the old policy did."""
    actions_R = torch.arange(NUM_ACTIONS)
    chances_R = (OLD_LOGITS if has_old else LOGITS).softmax(0)
    tokens = tokens_of(actions_R, torch.zeros(NUM_ACTIONS, dtype=torch.float64), has_old=has_old, weight_R=chances_R)
    found = gradient(replace(GRPO, kl=kind, kl_weight=1.0), tokens, actions_R)
    expected, other = (divergence_gradient(reverse=each) for each in (is_reverse, not is_reverse))
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-14)
    assert float((found - other).abs().max()) > 0.05


@pytest.mark.parametrize("has_old", [False, True])
@pytest.mark.parametrize("near", [1.0, 1e-4])
def test_reported_divergence_is_within_three_standard_errors_of_the_enumerated_one(has_old: bool, near: float) -> None:
    form, num_draws = replace(GRPO, kl="none"), 100_000
    chances_A = (OLD_LOGITS if has_old else LOGITS).softmax(0)
    actions_R = torch.multinomial(chances_A, num_draws, replacement=True, generator=torch.Generator().manual_seed(5))
    reference_A = (LOGITS + near * (REFERENCE_LOGITS - LOGITS)).log_softmax(0)
    own_A = LOGITS.log_softmax(0)
    exact = float((own_A.exp() * (own_A - reference_A)).sum())
    each = []
    for action in range(NUM_ACTIONS):
        place = torch.tensor([action])
        tokens = tokens_of(place, torch.zeros(1, dtype=torch.float64), has_old=has_old, near=near)
        each.append(policy_terms(form, tokens, own_A[place]).sums["kl"])
        assert float(each[-1]) >= 0
    values_R = torch.stack(each)[actions_R]
    error = float(values_R.std()) / num_draws**0.5
    assert abs(float(values_R.mean()) - exact) <= 3 * error
    assert 0 < error < exact


def test_divergence_from_the_policy_itself_is_zero_to_the_bit() -> None:
    actions_R, zeros_R = torch.arange(NUM_ACTIONS), torch.zeros(NUM_ACTIONS, dtype=torch.float64)
    for kind in ("reverse", "reverse_squared", "forward"):
        form = replace(GRPO, kl=kind, kl_weight=0.5)
        tokens = tokens_of(actions_R, zeros_R, has_old=False, near=0.0)
        terms = policy_terms(form, tokens, LOGITS.log_softmax(0)[actions_R])
        assert torch.equal(terms.slopes_R, zeros_R)
        assert float(terms.sums["kl"]) == 0


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
