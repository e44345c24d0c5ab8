"""Terms of policy gradients: what each sampled token adds to the loss, its slope, and reported sums.

Sources: arXiv:2402.03300, 2412.19437 section 5.2.2, 2503.20783, 2503.14476, 2507.18071, 2506.13585, 2505.07291,
2512.02556. All values are float64. Shape legend: R sampled tokens.
"""

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from model.config import PolicyLossConfig
from model.objective import MAIN

KL = "kl"
ENTROPY = "entropy"
CLIPPED = "clip_fraction"
RATIO = "ratio_deviation"
SAMPLER_DIFFERENCE = "sampler_difference"
OFF_POLICY = "off_policy_share"
TOKEN_MEANS = (ENTROPY, CLIPPED, RATIO, SAMPLER_DIFFERENCE)
"""Names of reported means over tokens. With a reference, the divergence is another one."""
_LARGEST_LOG_RATIO = 20.0


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class AnswerTokens:
    """Values of sampled tokens besides their log-probabilities under the policy, R in float64.

    Attributes:
        weight_R: factor of the token's term in the loss; 0 for rows that are no sampled tokens.
        is_token_R: 1 for sampled tokens, else 0.
        length_R: tokens of the answer.
        sampler_R: log-probability under the sampler.
        old_R: the same under the old policy; None: it is the policy itself.
        reference_R: the same under the reference; None: there is none.
        ratio_R: ratio of the answer, the same for all its tokens; None: each token has its own ratio.
        sampler_factor_R: weight of the answer for what its sampler was; None: each token has its own.
        has_surrogate_R: 0 for tokens of answers that are too far off the policy, else 1; None: 1 for all.
    """

    advantage_R: Tensor
    weight_R: Tensor
    is_token_R: Tensor
    length_R: Tensor
    sampler_R: Tensor
    old_R: Tensor | None
    reference_R: Tensor | None
    ratio_R: Tensor | None = None
    sampler_factor_R: Tensor | None = None
    has_surrogate_R: Tensor | None = None

    def part(self, chunk: slice) -> "AnswerTokens":
        """Returns the values of a chunk of the rows."""
        cut: dict[str, Any] = {}
        for field in fields(self):
            values_R = getattr(self, field.name)
            cut[field.name] = None if values_R is None else values_R[chunk]
        return AnswerTokens(**cut)


@dataclass(frozen=True, slots=True, eq=False)
class PolicyTerms:
    """Derivative of the loss in -log p of each token, and sums of the loss and reported values."""

    slopes_R: Tensor
    sums: dict[str, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class _Term:
    """A value of each token, and its derivative in log p."""

    value_R: Tensor
    slope_R: Tensor


def policy_terms(form: PolicyLossConfig, tokens: AnswerTokens, log_probs_R: Tensor) -> PolicyTerms:
    """Computes the loss of tokens, its derivative in each -log p, and reported sums."""
    log_probs_R = log_probs_R.double()
    old_R = log_probs_R if tokens.old_R is None else tokens.old_R
    own_ratio_R = bounded_exp(log_probs_R - old_R)
    ratio_R = own_ratio_R if tokens.ratio_R is None else tokens.ratio_R
    surrogate, is_clipped_R = _surrogate(form, tokens, ratio_R, log_probs_R)
    factor_R = _surrogate_factor(form, tokens, old_R)
    loss_R = -factor_R * surrogate.value_R
    slope_R = factor_R * surrogate.slope_R
    means: dict[str, Tensor] = {}
    if tokens.reference_R is not None:
        log_q_R = tokens.reference_R - log_probs_R
        # exp(x) - x - 1 is never negative, and expm1 keeps its digits near x = 0.
        excess_R = (torch.expm1(log_q_R.clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)) - log_q_R).clamp_min(0)
        means[KL] = own_ratio_R * excess_R
        if form.kl_weight and form.kl != "none":
            divergence = _divergence(form, own_ratio_R, log_q_R, excess_R)
            loss_R = loss_R + form.kl_weight * divergence.value_R
            slope_R = slope_R - form.kl_weight * divergence.slope_R
    means |= {
        ENTROPY: -log_probs_R,
        CLIPPED: is_clipped_R,
        RATIO: (ratio_R - 1).abs(),
        SAMPLER_DIFFERENCE: (old_R - tokens.sampler_R).abs(),
    }
    sums = {MAIN: (tokens.weight_R * loss_R).sum()}
    sums |= {name: (tokens.is_token_R * each_R).sum() for name, each_R in means.items()}
    if tokens.has_surrogate_R is not None:
        sums[OFF_POLICY] = (tokens.is_token_R * (1 - tokens.has_surrogate_R) / tokens.length_R).sum()
    return PolicyTerms(tokens.weight_R * slope_R, sums)


def bounded_exp(logs: Tensor) -> Tensor:
    """Returns exp of values that are bounded to +-20, so that nothing overflows. Slopes ignore the bound."""
    return logs.clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO).exp()


def _surrogate(
    form: PolicyLossConfig, tokens: AnswerTokens, ratio_R: Tensor, log_probs_R: Tensor
) -> tuple[_Term, Tensor]:
    advantage_R = tokens.advantage_R
    largest = math.inf if form.largest_ratio is None else form.largest_ratio
    bounded_R = ratio_R.clamp_max(largest)
    if form.surrogate == "weighted":
        slope_R = bounded_R * advantage_R
        return _Term(slope_R * log_probs_R, slope_R), ratio_R > largest
    low = -math.inf if form.clip_low is None else 1 - form.clip_low
    high = math.inf if form.clip_high is None else 1 + form.clip_high
    value_R = torch.minimum(bounded_R * advantage_R, bounded_R.clamp(low, high) * advantage_R)
    is_clipped_R = ((advantage_R > 0) & (ratio_R > min(high, largest))) | (
        (advantage_R < 0) & ((ratio_R < low) | (ratio_R > largest))
    )
    if form.ratio == "sequence_product":
        value_R = value_R / tokens.length_R
    # A ratio has derivative ratio in the log-probability of its token. In that of any token of an answer of n tokens,
    # the n equal values of a geometric mean have together n * ratio / n, and the n shares of a product n * ratio / n.
    return _Term(value_R, (ratio_R * advantage_R).masked_fill(is_clipped_R, 0)), is_clipped_R


def _surrogate_factor(form: PolicyLossConfig, tokens: AnswerTokens, old_R: Tensor) -> Tensor:
    factor_R = tokens.is_token_R if tokens.has_surrogate_R is None else tokens.has_surrogate_R
    if tokens.sampler_factor_R is not None:
        return factor_R * tokens.sampler_factor_R
    if form.sampler_ratio_cap is None:
        return factor_R
    return factor_R * sampler_factor(old_R, tokens.sampler_R, form.sampler_ratio_cap)


def sampler_factor(old_R: Tensor, sampler_R: Tensor, cap: float) -> Tensor:
    """Returns the bounded ratio of old policy to sampler of each token."""
    return bounded_exp(old_R - sampler_R).clamp_max(cap)


def _divergence(form: PolicyLossConfig, own_ratio_R: Tensor, log_q_R: Tensor, excess_R: Tensor) -> _Term:
    """Returns the divergence of each token from the reference; `excess_R` is q - log q - 1."""
    if form.kl == "reverse":
        return _Term(own_ratio_R * excess_R, -own_ratio_R * log_q_R)
    if form.kl == "reverse_squared":
        return _Term(log_q_R.square() / 2, -log_q_R)
    return _Term(excess_R, 1 - bounded_exp(log_q_R))
