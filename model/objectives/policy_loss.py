"""Configuration of the loss of policy gradients. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from kernels.ranges import NonNegativeFloat, PositiveFloat


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyLossConfig:
    """The loss of sampled answers with advantages, of which every published variant is a choice of values.

    A ratio is the probability of tokens under the policy divided by that under the old policy.

    Attributes:
        advantage: reward minus the mean of the group (centered), also divided by the group's standard deviation
            (standardized).
        ratio: that of each token; for all tokens of an answer the geometric mean of their ratios (sequence_mean, GSPO),
            or their product (sequence_product, the form of V3's report), in which case each token has an equal share
            of the answer's surrogate.
        surrogate: min(ratio A, clip(ratio) A), or the weighted log-probability min(ratio, largest_ratio) A log p with a
            constant weight (CISPO).
        clip_low: how far below 1 a ratio counts if the advantage is negative; None: any. For the clipped surrogate.
        clip_high: how far above 1 a ratio counts if the advantage is positive; None: any. For the clipped surrogate.
        largest_ratio: bound of all ratios; None: none.
        normalizer: mean over answers of the mean over tokens (answers), mean over all tokens (tokens), sum over tokens
            divided by answers and by the maximum number of tokens of an answer (length), or mean over answers of the
            sum over tokens (sums).
        equal_groups: whether answers of groups with equal rewards, whose advantage is 0, count in the denominator
            (count), or not, because other groups are drawn in their place (leave_out, DAPO's dynamic sampling).
        kl: estimator of the divergence from the reference, by the gradient that it has on answers of the policy
            itself: that of KL(policy || reference) (reverse: ratio (q - log q - 1) with q = reference / policy;
            reverse_squared: (log q)^2 / 2) or of KL(reference || policy) (forward: q - log q - 1). It has each token's
            own ratio. none: the divergence has no part in the loss.
        kl_weight: weight of the divergence.
        off_policy_limit: an answer with negative advantage has no surrogate if the mean over its tokens of
            log(sampler / policy) is above this (DeepSeek-V3.2); None: all have one.
        sampler_ratio_cap: bound of the ratio of old policy to sampler, which weighs the surrogate of each token; None:
            all weigh 1.
    """

    advantage: Literal["standardized", "centered"]
    ratio: Literal["token", "sequence_mean", "sequence_product"]
    surrogate: Literal["clipped", "weighted"]
    clip_low: NonNegativeFloat | None
    clip_high: NonNegativeFloat | None
    largest_ratio: PositiveFloat | None
    normalizer: Literal["answers", "tokens", "length", "sums"]
    kl: Literal["reverse", "reverse_squared", "forward", "none"]
    kl_weight: NonNegativeFloat
    off_policy_limit: NonNegativeFloat | None
    sampler_ratio_cap: PositiveFloat | None
    equal_groups: Literal["count", "leave_out"] = "count"
