"""Registers reward models and direct preference optimization (arXiv:2305.18290). No torch here."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from base.ranges import NonNegativeFloat, PositiveFloat, ShareBelowOne
from model.config import ModelConfig
from train.config import BatchConfig
from train.tasks.registry import TASKS, TaskSpec
from train.tasks.samples import SampleTaskConfig, check_samples

if TYPE_CHECKING:
    from train.tasks.pairs import DirectPreference, Ranking


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


@dataclass(frozen=True, kw_only=True, slots=True)
class DpoConfig(SampleTaskConfig):
    """The configuration of preference optimization. The reference is the model that the run starts from.

    `label_smoothing` is the probability that a pair is labelled the wrong way round; `sft_weight` is per token.
    """

    beta: PositiveFloat
    label_smoothing: ShareBelowOne
    sft_weight: NonNegativeFloat


def build_dpo(config: DpoConfig, model: ModelConfig, batch: BatchConfig) -> "DirectPreference":
    """Builds the task of preference optimization."""
    from train.tasks.pairs import DirectPreference

    return DirectPreference(config, model.mtp_depth)


TASKS.register(
    "dpo",
    TaskSpec(
        summary="direct preference optimization on pairs of answers",
        config=DpoConfig,
        build=build_dpo,
        values=("pair",),
        unit="pair",
        has_reference=lambda task: True,
        needs_weights=True,
        check=check_samples,
        example={"epochs": None, "beta": 0.1, "label_smoothing": 0.1, "sft_weight": 0.2},
    ),
)
