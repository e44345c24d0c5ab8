"""Configuration of rollouts: which prompts a step samples answers to, and how. No torch here."""

from dataclasses import dataclass
from typing import Literal

from kernels.ranges import NonNegativeInt, PositiveFloat, PositiveInt, Share, ShareBelowOne


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutLimits:
    """Limits beyond which the guard refuses a step; `conf/rollout/default.yaml` explains them."""

    kl: PositiveFloat | None
    cut_share: Share | None
    equal_steps: PositiveInt | None
    entropy_share: ShareBelowOne | None
    reward_share: ShareBelowOne | None
    window_steps: PositiveInt
    no_verdict_share: Share | None = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutConfig:
    """The rollouts of a run that learns from rewards. `conf/rollout/default.yaml` explains the keys."""

    engine: Literal["pipelined", "local"]
    prompts: PositiveInt
    samples: PositiveInt
    max_new_tokens: PositiveInt
    temperature: PositiveFloat
    top_k: PositiveInt | None
    top_p: Share
    min_p: Share
    thinking: bool | None
    updates: PositiveInt
    steps_ahead: Literal[0, 1]
    drop_equal_groups: bool
    max_draws: PositiveInt
    cut_answers: Literal["keep", "drop"]
    length_penalty_tokens: NonNegativeInt
    keep_routing: bool
    keep_sampling_mask: bool
    held_out: NonNegativeInt
    held_out_samples: PositiveInt
    limits: RolloutLimits
