"""Scores the answers of a rollout: by rules on rank 0, and by models on all ranks."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

from torch import distributed as dist

from infer.protocol import Engine, Group, Sample
from infer.scoring.reward import GroupSheets, ModelScores, Reward, RewardConfig, combine, host_parts
from infer.scoring.score import Score, ScorerConfig, ScoringError
from infer.scoring.scorers import Judge, JudgeConfig, RewardModelScorerConfig, read_constitution
from train.config import TrainConfig
from train.post.engine import ReplicaEngine, TrainingEngine
from train.post.reward_model import open_reward_model
from train.post.sample import PromptForm
from train.post.statistics import NO_VERDICT
from train.replica import Replica
from train.world import World


class ModelPart(Protocol):
    """Protocol of a part of a reward that all ranks compute."""

    def score(self, groups: Sequence[Group], step: int) -> list[list[Score]]:
        """Returns the scores of every group's answers, equal on all ranks. All ranks call it."""
        ...

    def close(self) -> None:
        """Closes what the part opened. All ranks call it at the same point."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgePart:
    """Votes of a judge whose critiques an engine samples."""

    judge: Judge
    engine: Engine
    seed: int
    stop: frozenset[int]
    opened: TrainingEngine | None = None

    def score(self, groups: Sequence[Group], step: int) -> list[list[Score]]:
        """Implements `ModelPart.score`."""
        prompts = self.judge.prompts(groups, [group.number for group in groups])
        critiques: Sequence[Sample] = ()
        if prompts:
            request = self.judge.request(self.seed, step, self.stop)
            critiques = self.engine.generate([each.prompt for each in prompts], request).rollouts
        return self.judge.scores(groups, prompts, critiques)

    def close(self) -> None:
        """Implements `ModelPart.close`."""
        if self.opened is not None:
            self.opened.close()


def open_model_parts(
    config: TrainConfig, policy: Replica, reference: Replica | None, engine: Engine, form: PromptForm
) -> Mapping[str, ModelPart]:
    """Opens the parts of a run's reward that need models, by kind. All ranks call it."""
    assert config.reward is not None
    parts: dict[str, ModelPart] = {}
    for part in config.reward.parts:
        match part:
            case JudgeConfig():
                parts[part.kind] = _open_judge(config, part, reference, engine, form)
            case RewardModelScorerConfig():
                parts[part.kind] = open_reward_model(config, part, policy, form.tokenizer)
            case ScorerConfig():
                pass
    return parts


def _open_judge(
    config: TrainConfig, part: JudgeConfig, reference: Replica | None, engine: Engine, form: PromptForm
) -> JudgePart:
    longest = max(1, config.model.max_position_tokens - part.max_new_tokens)
    judge = Judge(part, form.template, form.tokenizer, part.constitution, longest)
    stop = frozenset([form.tokenizer.end_of_sentence_id])
    if part.weights == "policy":
        return JudgePart(judge=judge, engine=engine, seed=config.seed, stop=stop)
    assert reference is not None
    opened = ReplicaEngine(reference)
    return JudgePart(judge=judge, engine=opened, seed=config.seed, stop=stop, opened=opened)


def with_constitutions(config: RewardConfig, world: World) -> RewardConfig:
    """Returns a reward whose judges have the text of their constitutions. Rank 0 reads the files."""
    shared: list[RewardConfig | ScoringError] = [config]
    if world.rank == 0:
        try:
            shared = [replace(config, parts=tuple(_with_text(part) for part in config.parts))]
        except ScoringError as error:
            shared = [error]
    with world.phase("constitution of the judge"):
        dist.broadcast_object_list(shared, src=0, group=world.groups.world)
    if isinstance(shared[0], ScoringError):
        raise shared[0]
    return shared[0]


def _with_text(part: ScorerConfig) -> ScorerConfig:
    if not isinstance(part, JudgeConfig):
        return part
    return replace(part, constitution=read_constitution(part), constitution_path=None)


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What rank 0 found with rules: the sheets of each group, none without rules, or an error."""

    sheets: list[GroupSheets] | None
    error: str = ""


class RolloutRewards:
    """The reward of a run. Rank 0 scores with rules, all ranks with models; all have all scores."""

    def __init__(self, config: RewardConfig, world: World, models: Mapping[str, ModelPart] | None = None) -> None:
        """Starts the scorers, or raises ScoringError if this machine cannot. All ranks call it."""
        self._config = config
        self._world = world
        self._models = models or {}
        host = host_parts(config)
        self._reward = Reward(host) if world.rank == 0 and host is not None else None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rewards") if world.rank == 0 else None

    def begin(self, groups: Sequence[Group], step: int) -> "PendingScores":
        """Scores the answers of groups with models, and starts to score them with rules, in a thread.

        All ranks call it. `PendingScores.wait` returns the scores.
        """
        # Rules do not depend on models, so both run at the same time.
        host = None if self._thread is None else self._thread.submit(self._score, groups)
        models = {kind: part.score(groups, step) for kind, part in self._models.items()}
        return PendingScores(self._config, self._world, groups, models, host)

    def close(self) -> None:
        """Ends the scorers. All ranks call it at the same point."""
        if self._thread is not None:
            self._thread.shutdown()
        if self._reward is not None:
            self._reward.close()
        for part in self._models.values():
            part.close()

    def _score(self, groups: Sequence[Group]) -> _Outcome:
        try:
            return _Outcome(None if self._reward is None else self._reward.score_groups(groups))
        except ScoringError as error:
            return _Outcome(None, str(error))


@dataclass(frozen=True, slots=True)
class PendingScores:
    """Scores of models, and scores of rules that rank 0 is computing."""

    config: RewardConfig
    world: World
    groups: Sequence[Group]
    models: ModelScores
    host: Future[_Outcome] | None

    def wait(self) -> list[Group]:
        """Returns the groups with the scores of their answers. All ranks call it.

        A group with an answer without a verdict is dropped.

        Raises:
            ScoringError: on every rank, if the scorers failed.
        """
        shared = [None if self.host is None else self.host.result()]
        with self.world.phase("scores of the answers"):
            dist.broadcast_object_list(shared, src=0, group=self.world.groups.world)
        outcome = shared[0]
        assert outcome is not None
        if outcome.error:
            raise ScoringError(outcome.error)
        scored = combine(self.config, self.groups, outcome.sheets, self.models)
        return [_with_sheets(group, sheets) for group, sheets in zip(self.groups, scored, strict=True)]


def _with_sheets(group: Group, scored: GroupSheets) -> Group:
    answers = tuple(replace(answer, sheet=sheet) for answer, sheet in zip(group.answers, scored.sheets, strict=True))
    return replace(group, answers=answers, dropped=f"{NO_VERDICT}: {scored.dropped}" if scored.dropped else "")
