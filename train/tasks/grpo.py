"""Defines the task of policy gradients of groups of sampled answers. No torch here."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from base.ranges import PositiveFloat, PositiveInt
from base.refusal import ConfigError
from model.config import ModelConfig, PolicyLossConfig
from train.config import BatchConfig, TaskConfig
from train.tasks.registry import TASKS, TaskSpec

if TYPE_CHECKING:
    from train.config import TrainConfig
    from train.tasks.next_token import PolicyGradientTask


@dataclass(frozen=True, kw_only=True, slots=True)
class GrpoConfig(TaskConfig):
    """The configuration of policy gradients of groups of sampled answers (GRPO and its variants).

    The present weights become the reference after `reference_every_steps`; None: it stays the run's first model.
    Beyond `kl_limit` the guard refuses a step. Sampling and limits follow keys of `rollout`.
    """

    loss: PolicyLossConfig
    reference_every_steps: PositiveInt | None
    temperature: PositiveFloat
    max_new_tokens: PositiveInt
    kl_limit: PositiveFloat | None

    @property
    def advantage(self) -> Literal["standardized", "centered"]:
        """How rewards of a group become advantages."""
        return self.loss.advantage

    @property
    def has_reference(self) -> bool:
        """Whether the divergence from a reference has a part in the loss or a limit."""
        return self.kl_limit is not None or (self.loss.kl != "none" and self.loss.kl_weight > 0)


def leaves_out_equal_groups(config: "TrainConfig") -> bool:
    """Returns whether answers of groups with equal rewards take no part in the passes of a step.

    Their advantage is 0. So they change no gradient without a divergence, balance or MTP modules that learn.
    """
    task = config.task
    rollouts = config.rollout
    assert isinstance(task, GrpoConfig)
    assert rollouts is not None
    is_replaced = task.loss.equal_groups == "leave_out" or rollouts.max_draws > 1
    rates = [task.bias_update_rate, *([task.mtp_loss_weight] if config.model.mtp_depth else [])]
    weights = [
        task.loss.kl_weight,
        task.balance_loss_weight,
        *(point.value for rate in rates for point in rate.points),
    ]
    return rollouts.drop_equal_groups and (is_replaced or not any(weights))


def build_grpo(config: GrpoConfig, model: ModelConfig, batch: BatchConfig) -> "PolicyGradientTask":
    """Builds the task of policy gradients."""
    from train.tasks.next_token import PolicyGradientTask

    return PolicyGradientTask(config, model.mtp_depth)


def check_policy_loss(config: "TrainConfig") -> None:
    """Rejects values of the loss that have no effect next to others."""
    assert isinstance(config.task, GrpoConfig)
    loss = config.task.loss
    key = "task.loss"
    if loss.kl == "none" and loss.kl_weight:
        raise ConfigError(f"{key}.kl_weight: must be 0 with {key}.kl=none, is {loss.kl_weight:g}; nearest valid: 0")
    for name in ("clip_low", "clip_high"):
        if loss.surrogate == "weighted" and getattr(loss, name) is not None:
            raise ConfigError(
                f"{key}.{name}: must be null with {key}.surrogate=weighted, which clips nothing, is "
                f"{getattr(loss, name):g}; nearest valid: null"
            )
    bound = 1 if loss.surrogate == "weighted" or loss.clip_high is None else 1 + loss.clip_high
    if loss.largest_ratio is not None and loss.largest_ratio < bound:
        raise ConfigError(
            f"{key}.largest_ratio: must be {bound:g} or above, from where ratios are clipped, is "
            f"{loss.largest_ratio:g}; nearest valid: {bound:g}"
        )


TASKS.register(
    "grpo",
    TaskSpec(
        summary="policy gradients of sampled answers and their rewards",
        config=GrpoConfig,
        build=build_grpo,
        has_reference=lambda task: task.has_reference,
        reference_interval=lambda task: task.reference_every_steps,
        has_rollouts=True,
        needs_weights=True,
        check=check_policy_loss,
    ),
)
