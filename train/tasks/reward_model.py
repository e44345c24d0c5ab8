"""Registers the training of a reward model: a score of answers that ranks pairs. No torch here."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kernels.ranges import NonNegativeFloat
from model.config import ModelConfig
from train.config import BatchConfig
from train.tasks.registry import TASKS, TaskSpec
from train.tasks.samples import SampleTaskConfig, check_samples

if TYPE_CHECKING:
    from train.tasks.pairs import Ranking


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardModelConfig(SampleTaskConfig):
    """The configuration of a reward model. `centre` weighs the squared sum of a pair's scores."""

    centre: NonNegativeFloat


def build_reward_model(config: RewardModelConfig, model: ModelConfig, batch: BatchConfig) -> "Ranking":
    """Builds the task of a reward model."""
    from train.tasks.pairs import Ranking

    return Ranking(config)


TASKS.register(
    "reward_model",
    TaskSpec(
        summary="a score that ranks the answers of pairs (Bradley-Terry)",
        config=RewardModelConfig,
        build=build_reward_model,
        head="score",
        unit="pair",
        needs_weights=True,
        values=("score",),
        check=check_samples,
        example={"epochs": None, "centre": 0.01},
    ),
)
