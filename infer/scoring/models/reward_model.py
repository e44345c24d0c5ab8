"""Configures the score of a trained reward model as a part of a reward."""

from dataclasses import dataclass
from typing import Literal

from infer.scoring.models.parts import refuse_without_run
from infer.scoring.score import SCORERS, ScorerConfig, ScorerSpec
from kernels.ranges import PositiveInt


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardModelScorerConfig(ScorerConfig):
    """The configuration of the score of a reward model.

    Attributes:
        ckpt: a checkpoint of task=reward_model, or a Hugging Face folder with a score head.
        place: pipeline: a second, frozen network on all ranks, under the schedule of the policy; first_rank: whole on
            rank 0, while the other ranks wait.
        batch_size: sequences that rank 0 computes together. It changes no score.
    """

    ckpt: str
    place: Literal["pipeline", "first_rank"]
    batch_size: PositiveInt


SCORERS.register(
    "reward_model",
    ScorerSpec(
        summary="score of a trained reward model",
        config=RewardModelScorerConfig,
        build=refuse_without_run,
        has_verdict=False,
        needs_model=True,
    ),
)
