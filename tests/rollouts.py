"""Configures tiny runs that learn from rewards: short arithmetic problems, and even digits in answers as the reward."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from comm.config import ParallelismConfig
from data.arithmetic import ArithmeticSource
from dualpipe.registry import ScheduleConfig
from infer.protocol import Group, Sample
from model.config import PolicyLossConfig
from score.reward import RewardConfig, ScoreSheet
from score.score import SCORERS, Answer, Problem, RatingScorer, Score, ScorerConfig, ScorerSpec
from tests.tiny import BATCH, MODEL, tiny_config
from train.config import TokenSchedule, TrainConfig
from train.config.tasks import RolloutConfig, RolloutLimits
from train.post.sample import RolloutHeader
from train.tasks.grpo import GrpoConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class EvenConfig(ScorerConfig):
    """The configuration of even digits."""


class EvenScorer(RatingScorer):
    """Counts the even digits of an answer, which an untrained model has in different numbers."""

    def score(self, answer: Answer, problem: Problem) -> Score:
        return Score(value=float(sum(each in "02468" for each in answer.text)), outcome="rated")


SCORERS.register(
    "even", ScorerSpec(summary="even digits", config=EvenConfig, build=lambda config: EvenScorer(), has_verdict=False)
)


class SparseScorer(EvenScorer):
    """As `EvenScorer` for the problems whose digits add up to a multiple of 16; others have equal rewards."""

    def score(self, answer: Answer, problem: Problem) -> Score:
        is_live = sum(map(int, filter(str.isdecimal, problem.prompt))) % 16 == 0
        return super().score(answer, problem) if is_live else Score(value=1.0, outcome="rated")


SCORERS.register(
    "sparse",
    ScorerSpec(summary="even digits", config=EvenConfig, build=lambda config: SparseScorer(), has_verdict=False),
)

ROLLOUT = RolloutConfig(
    engine="pipelined",
    prompts=4,
    samples=3,
    max_new_tokens=7,
    temperature=1.0,
    top_k=None,
    top_p=1.0,
    min_p=0.0,
    thinking=None,
    updates=1,
    steps_ahead=0,
    drop_equal_groups=True,
    max_draws=1,
    cut_answers="keep",
    length_penalty_tokens=0,
    keep_routing=False,
    keep_sampling_mask=False,
    held_out=0,
    held_out_samples=1,
    limits=RolloutLimits(
        kl=None, cut_share=None, equal_steps=None, entropy_share=None, reward_share=None, window_steps=1
    ),
)

LOSS = PolicyLossConfig(
    advantage="standardized",
    ratio="token",
    surrogate="clipped",
    clip_low=0.2,
    clip_high=0.28,
    largest_ratio=None,
    normalizer="tokens",
    kl="reverse",
    kl_weight=0.1,
    off_policy_limit=None,
    sampler_ratio_cap=None,
)

GRPO = GrpoConfig(
    kind="grpo",
    steps=2,
    mtp_loss_weight=TokenSchedule.constant(0.1),
    balance_loss_weight=0.0,
    bias_update_rate=TokenSchedule.constant(0.0),
    loss=LOSS,
    reference_every_steps=None,
    temperature=1.0,
    max_new_tokens=7,
    kl_limit=None,
)

REWARD = RewardConfig(parts=(EvenConfig(kind="even", weight=1.0),), num_threads=1)


def answer_of(sample: int = 0, tokens: tuple[int, ...] = (1,), **values: Any) -> Sample:
    """Returns an answer that the model ended, with the reward that its sheet has."""
    reward = values.get("reward", 0.0)
    sheet = ScoreSheet(total=reward, outcome="rated", parts={})
    known: dict[str, Any] = {"prompt": 7, "log_probs": (-1.0,) * len(tokens), "finish": "stop", "sheet": sheet}
    return Sample(sample=sample, tokens=tokens, **{**known, **values})


def group_of(*answers: Sample, number: int = 7, tokens: tuple[int, ...] = (1,), **values: Any) -> Group:
    known: dict[str, Any] = {"key": "key", "problem": Problem(prompt="")}
    return Group(number=number, tokens=tokens, answers=answers, **{**known, **values})


def header_of(step: int = 1, **values: Any) -> RolloutHeader:
    known: dict[str, Any] = {"rollout": step - 1, "weights": "w", "settings": "s", "next_prompt": 2}
    return RolloutHeader(step=step, **{**known, **values})


def rollout_config(folder: Path, pipeline: int = 1, data: int = 1, expert: int = 1, **changes: Any) -> TrainConfig:
    """Returns a float64 run of two steps, with as few micro-batches as its schedule takes, and two answers in a row."""
    config = tiny_config(
        folder,
        parallelism=ParallelismConfig(pipeline=pipeline, data=data, expert=expert),
        schedule=ScheduleConfig(kind="1f1b" if pipeline == 1 else "dualpipe", chunks=None, pairing="overlapped"),
        model=replace(MODEL, num_layers=max(3, pipeline), vocab_size=32),
        batch=replace(BATCH, global_sequences=2 * pipeline * data, sequence_length_tokens=48, document_mask=True),
        task=GRPO,
        rollout=ROLLOUT,
        reward=REWARD,
    )
    source = ArithmeticSource(
        kind="arithmetic",
        form="demonstrations",
        template="v3",
        num_digits=4,
        num_samples=60,
        wrong_share=0.0,
        domains=("sort",),
        generator_seed=1,
    )
    return replace(config, data=replace(config.data, source=source), **changes)
