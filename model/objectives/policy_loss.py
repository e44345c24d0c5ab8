"""Configuration of the loss of policy gradients. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from kernels.ranges import NonNegativeFloat, PositiveFloat


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyLossConfig:
    """The loss of sampled answers with advantages, of which every published variant is a choice of values.

    A ratio is the probability of tokens under the policy divided by that under the old policy. `conf/task/loss`
    explains the keys; None means no bound.

    Attributes:
        ratio: with one ratio for an answer, each token has an equal share of the answer's surrogate (GSPO, V3's
            report).
        surrogate: min(ratio A, clip(ratio) A), or min(ratio, largest_ratio) A log p with a constant weight (CISPO).
        kl: estimator of the divergence from the reference, by its gradient on answers of the policy itself. With q =
            reference / policy: ratio (q - log q - 1) (reverse), (log q)^2 / 2 (reverse_squared), or q - log q - 1
            (forward). It has each token's own ratio.
        off_policy_limit: an answer with negative advantage has no surrogate if the mean over its tokens of
            log(sampler / policy) is above this (DeepSeek-V3.2).
        sampler_ratio_cap: bound of the ratio of old policy to sampler, which weighs the surrogate of each token.
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
