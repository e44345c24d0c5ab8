"""Parts of a reward that models score on all ranks: votes of a judge, and scores of a reward model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import distributed as dist

from infer.engines.protocol import Engine, NumberedPrompt, Rollout
from infer.scoring.models.judge import Judge, JudgeConfig, read_constitution
from infer.scoring.models.reward_model import RewardModelScorerConfig
from infer.scoring.reward import AnswerGroup, RewardConfig
from infer.scoring.score import Score, ScorerConfig, ScoringError, failure
from train.config import TrainConfig
from train.replica import Replica
from train.rollout.engine import ReplicaEngine, TrainingEngine
from train.rollout.groups.draw import PromptForm
from train.rollout.reward_model import RewardModel, open_reward_model
from train.world import World


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledGroup:
    """The answers to a prompt, as token ids and as text.

    Attributes:
        prompt: numbered within the job.
        rollouts: by sample.
        text: the same answers as scorers see them.
    """

    prompt: NumberedPrompt
    rollouts: tuple[Rollout, ...]
    text: AnswerGroup


class ModelPart(Protocol):
    """Protocol of a part of a reward that all ranks compute."""

    def score(self, groups: Sequence[SampledGroup], step: int) -> list[list[Score]]:
        """Returns the scores of every group's answers, equal on all ranks. All ranks call it."""
        ...

    def close(self) -> None:
        """Closes what the part opened. All ranks call it at the same point."""
        ...


class JudgePart:
    """Votes of a judge whose critiques an engine samples."""

    def __init__(self, judge: Judge, engine: Engine, seed: int, stop: frozenset[int]) -> None:
        """Stores the arguments.

        Args:
            judge: builds prompts and reads verdicts.
            engine: samples critiques; it stays open.
            stop: token ids that end a critique.
        """
        self._judge, self._engine, self._seed, self._stop = judge, engine, seed, stop

    def score(self, groups: Sequence[SampledGroup], step: int) -> list[list[Score]]:
        """Implements `ModelPart.score`."""
        answered = [group.text for group in groups]
        prompts = self._judge.prompts(answered, [group.prompt.number for group in groups])
        critiques: Sequence[Rollout] = ()
        if prompts:
            request = self._judge.request(self._seed, step, self._stop)
            critiques = self._engine.generate([each.prompt for each in prompts], request).rollouts
        return self._judge.scores(answered, prompts, critiques)

    def close(self) -> None:
        """Implements `ModelPart.close`."""


class ReferenceJudgePart(JudgePart):
    """Votes of a judge with an engine that this part opened."""

    def __init__(self, judge: Judge, engine: TrainingEngine, seed: int, stop: frozenset[int]) -> None:
        """Stores the arguments, which are those of `JudgePart`; the engine is closed with the part."""
        super().__init__(judge, engine, seed, stop)
        self._opened = engine

    def close(self) -> None:
        """Implements `ModelPart.close`."""
        self._opened.close()


@dataclass(frozen=True, slots=True)
class RewardModelPart:
    """Scores of a reward model at the last token of each answer.

    Attributes:
        model: the reward model.
    """

    model: RewardModel

    def score(self, groups: Sequence[SampledGroup], step: int) -> list[list[Score]]:
        """Implements `ModelPart.score`. An answer that is longer than the model can read is unknown."""
        sequences = [[(*group.prompt.tokens, *each.tokens) for each in group.rollouts] for group in groups]
        fitting = [each for group in sequences for each in group if len(each) <= self.model.longest]
        scores = iter(self.model.score(fitting))
        too_long = failure("unknown", f"has more than the {self.model.longest} tokens that the reward model reads")
        return [
            [
                Score(value=next(scores), outcome="rated") if len(each) <= self.model.longest else too_long
                for each in group
            ]
            for group in sequences
        ]

    def close(self) -> None:
        """Implements `ModelPart.close`."""
        self.model.close()


def open_model_parts(
    config: TrainConfig, policy: Replica, reference: Replica | None, engine: Engine, form: PromptForm
) -> Mapping[str, ModelPart]:
    """Opens the parts of a run's reward that need models, by kind. All ranks call it.

    Args:
        config: of the run; judges have the text of their constitutions.
        policy: the replica that the run trains.
        reference: the frozen network of the run's divergence; None: it has none.

    Raises:
        CheckpointError, HfError: a reward model has another tokenizer, or its weights cannot be read.
    """
    assert config.reward is not None
    found: dict[str, ModelPart] = {}
    for part in config.reward.parts:
        match part:
            case JudgeConfig():
                found[part.kind] = _open_judge(config, part, reference, engine, form)
            case RewardModelScorerConfig():
                found[part.kind] = RewardModelPart(open_reward_model(config, part, policy, form.tokenizer))
            case ScorerConfig():
                pass
    return found


def _open_judge(
    config: TrainConfig, part: JudgeConfig, reference: Replica | None, engine: Engine, form: PromptForm
) -> ModelPart:
    tokenizer = form.tokenizer
    longest = max(1, config.model.max_position_tokens - part.max_new_tokens)
    judge = Judge(part, form.template, tokenizer, part.constitution, longest)
    stop = frozenset([tokenizer.end_of_sentence_id])
    if part.weights == "policy":
        return JudgePart(judge, engine, config.seed, stop)
    assert reference is not None
    return ReferenceJudgePart(judge, ReplicaEngine(reference), config.seed, stop)


def with_constitutions(config: RewardConfig, world: World) -> RewardConfig:
    """Returns a reward whose judges have the text of their constitutions. Rank 0 reads the files.

    Raises:
        ScoringError: on every rank, if a file cannot be read.
    """
    found: list[RewardConfig | ScoringError] = [config]
    if world.rank == 0:
        try:
            found = [replace(config, parts=tuple(_with_text(part) for part in config.parts))]
        except ScoringError as error:
            found = [error]
    with world.phase("constitution of the judge"):
        dist.broadcast_object_list(found, src=0, group=world.groups.world)
    if isinstance(found[0], ScoringError):
        raise found[0]
    return found[0]


def _with_text(part: ScorerConfig) -> ScorerConfig:
    if not isinstance(part, JudgeConfig):
        return part
    return replace(part, constitution=read_constitution(part), constitution_path=None)
