"""Defines the task of policy gradients of groups of sampled answers. No torch here."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kernels.ranges import PositiveFloat, PositiveInt
from model.config import ModelConfig
from model.objectives.policy_loss import PolicyLossConfig
from train.config import BatchConfig, TaskConfig
from train.tasks.registry import TASKS, TaskSpec

if TYPE_CHECKING:
    from train.tasks.policy_gradient import PolicyGradientTask


@dataclass(frozen=True, kw_only=True, slots=True)
class GrpoConfig(TaskConfig):
    """The configuration of policy gradients of groups of sampled answers (GRPO and its variants).

    Attributes:
        loss: values of the loss, which name a variant.
        reference_every_steps: the present weights become the reference after this many steps; None: the reference stays
            the model that the run started from.
        temperature: of the sampling (`rollout.temperature`).
        max_new_tokens: maximum number of tokens of an answer (`rollout.max_new_tokens`).
    """

    loss: PolicyLossConfig
    reference_every_steps: PositiveInt | None
    temperature: PositiveFloat
    max_new_tokens: PositiveInt

    @property
    def advantage(self) -> Literal["standardized", "centered"]:
        """How rewards of a group become advantages."""
        return self.loss.advantage

    @property
    def has_reference(self) -> bool:
        """Whether the divergence from a reference has a part in the loss."""
        return self.loss.kl != "none" and self.loss.kl_weight > 0


def build_grpo(config: GrpoConfig, model: ModelConfig, batch: BatchConfig) -> "PolicyGradientTask":
    """Builds the task of policy gradients."""
    from train.tasks.policy_gradient import PolicyGradientTask

    return PolicyGradientTask(config, model.mtp_depth)


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
    ),
)
