"""Configuration of rollouts: which prompts a step samples answers to, and how. No torch here."""

from dataclasses import dataclass
from typing import Literal

from kernels.ranges import NonNegativeInt, PositiveFloat, PositiveInt, Share, ShareBelowOne


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutLimits:
    """Limits beyond which the guard refuses a step of a run that learns from rewards.

    None: there is no such limit.

    Attributes:
        kl: divergence from the reference in nats per token, mean of three steps.
        cut_share: share of answers that reach `max_new_tokens`, in `window_steps` steps in a row.
        no_verdict_share: share of answers that the reward cannot judge, in three steps in a row.
        equal_steps: number of steps in a row in which each group has equal rewards or cannot be judged.
        entropy_share: mean entropy of the last `window_steps` steps, divided by that of the run's first ones.
        reward_share: the same of the reward, if the mean reward of the first steps is above 0.
    """

    kl: PositiveFloat | None
    cut_share: Share | None
    equal_steps: PositiveInt | None
    entropy_share: ShareBelowOne | None
    reward_share: ShareBelowOne | None
    window_steps: PositiveInt
    no_verdict_share: Share | None = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutConfig:
    """The rollouts of a run that learns from rewards.

    Attributes:
        top_k, top_p, min_p: which probable tokens are kept; None, 1 and 0 keep all.
        thinking: whether the model thinks first; None: as the template does.
        updates: updates of the weights per rollout, each from an equal part of its prompts.
        steps_ahead: number of steps by which answers are sampled ahead of their training, 0 or 1.
        drop_equal_groups: whether groups whose answers all have one reward are left out of the passes, where that
            cannot change the gradient or `task.loss.equal_groups` says so.
        max_draws: how often prompts are drawn until enough groups have different rewards; 1 draws once.
        cut_answers: whether answers that reached `max_new_tokens` are trained (keep), or take no part in the loss and
            its denominator (drop).
        length_penalty_tokens: the reward of an answer falls linearly by 1 over the last so many tokens before
            `max_new_tokens`; 0: it does not.
        keep_routing: whether training sends tokens to the experts that the sampler chose.
        keep_sampling_mask: whether training computes probabilities among the tokens that top_k, top_p and min_p kept.
    """

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
