"""Scores the answers of a rollout: by rules on rank 0, by a judge or a reward model on all ranks."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from comm.agreement import broadcast_first
from comm.dispatch.local import LocalDispatcher
from data.chat.messages import user
from data.corpus import fill_fields
from data.loader import Batch
from data.tokenizer import Tokenizer
from evaluation.judge import Judge
from infer.protocol import Engine, Group, NumberedPrompt, Sample
from infer.reward import score_answers
from model.objective import MicroBatch
from model.objectives.pairs import KeepScores
from model.transformer import Transformer, named_tensors
from score.reward import GroupSheets, ModelScores, Reward, RewardConfig, combine, host_parts, score_judged
from score.score import Score, ScorerConfig, ScoringError, failure
from score.scorers import JudgeConfig, RewardModelScorerConfig, read_constitution
from train.checkpoint.sources import (
    JUDGE_KEY,
    REWARD_MODEL_KEY,
    check_same_tokenizer,
    open_source,
    second_network_run,
)
from train.config import TrainConfig
from train.core.replica import Replica, open_replica
from train.core.world import ReplicaConfig, World, weight_dtype
from train.post.pack import BatchShape, fill, place_answers
from train.post.pipeline import ReplicaEngine, TrainingEngine
from train.post.sample import NO_VERDICT, PromptForm
from train.predict.cut import run_cut
from train.tasks.next_token import to_micro_batch

_SAME_TOKENIZER = "that was trained from the policy's weights"


@dataclass(frozen=True, slots=True)
class RewardModelPart:
    """Scores of answers by a reward model that reads `longest` tokens at most (see `ModelPart`)."""

    longest: int

    def rate(self, sequences: Sequence[tuple[int, ...]]) -> list[float]:
        """Returns the score of each sequence, equal on all ranks and, up to rounding, under every layout."""
        raise NotImplementedError

    def score(self, groups: Sequence[Group], step: int) -> list[list[Score]]:
        """Implements `ModelPart.score`. An answer that is longer than the model can read is unknown."""
        sequences = [[(*group.tokens, *answer.tokens) for answer in group.answers] for group in groups]
        fitting = [tokens for group in sequences for tokens in group if len(tokens) <= self.longest]
        scores = iter(self.rate(fitting))
        too_long = failure("unknown", f"has more than the {self.longest} tokens that the reward model reads")
        return [
            [
                Score(value=next(scores), outcome="rated") if len(tokens) <= self.longest else too_long
                for tokens in group
            ]
            for group in sequences
        ]

    def close(self) -> None:
        """Implements `ModelPart.close`."""


@dataclass(frozen=True, slots=True)
class PipelinedRater(RewardModelPart):
    """A frozen network with a score head on all ranks of the job."""

    replica: Replica
    pad_id: int

    def rate(self, sequences: Sequence[tuple[int, ...]]) -> list[float]:
        """Implements `RewardModelPart.rate`. The answers are packed into as many passes as they need."""
        # Equal answers are computed once.
        unique = list(dict.fromkeys(sequences))
        shape = BatchShape(
            num_sequences=self.replica.global_sequences,
            length=self.replica.config.batch.sequence_length_tokens,
            pad_id=self.pad_id,
        )
        nothing = Sample(prompt=0, sample=0, tokens=(), log_probs=(), finish="stop")
        answers = [(NumberedPrompt(number=0, tokens=tokens), nothing) for tokens in unique]
        places = place_answers(answers, shape)
        scores: dict[tuple[int, ...], float] = {}
        for number, batch in enumerate(fill(answers, places, shape, {}) if places else ()):
            scores_BT = self.replica.gather(self.replica.record(partial(self._read, batch), KeepScores()))
            here = [both for both in zip(unique, places, strict=True) if both[1].batch == number]
            scores |= {tokens: float(scores_BT[place.row, place.first]) for tokens, place in here}
        return [scores[tokens] for tokens in sequences]

    def _read(self, batch: Batch, direction: int, micro_batch: int) -> MicroBatch:
        first = self.replica.first_sequence(direction, micro_batch)
        part = batch.sequences(first, self.replica.config.batch.micro_sequences)
        return to_micro_batch(part, 0, self.replica.world.device, masks_documents=True)

    def close(self) -> None:
        """Closes the replica. All ranks call it at the same point."""
        self.replica.close()


@dataclass(frozen=True, slots=True)
class LocalRater(RewardModelPart):
    """A whole model in a process without other ranks."""

    batch_size: int
    model: Transformer

    def rate(self, sequences: Sequence[tuple[int, ...]]) -> list[float]:
        """Implements `RewardModelPart.rate`."""
        return score_answers(self.model, sequences, self.batch_size)


@dataclass(frozen=True, slots=True)
class WholeRater(RewardModelPart):
    """A whole model on rank 0, None elsewhere, which broadcasts its scores."""

    world: World
    batch_size: int
    model: Transformer | None

    def rate(self, sequences: Sequence[tuple[int, ...]]) -> list[float]:
        """Implements `RewardModelPart.rate`."""
        scores = [] if self.model is None else score_answers(self.model, sequences, self.batch_size)
        with self.world.log.collective("world", self.world.groups.world, "scores of answers"):
            return broadcast_first(scores, self.world.groups.world)


def open_reward_model(
    config: TrainConfig, part: RewardModelScorerConfig, policy: Replica, tokenizer: Tokenizer
) -> RewardModelPart:
    """Opens a reward model and loads its weights. All ranks call it.

    Raises:
        CheckpointError: the reward model has another tokenizer.
        CheckpointError, HfError: a tensor's content cannot be read.
    """
    check_same_tokenizer(part.ckpt, REWARD_MODEL_KEY, tokenizer, f"a reward model {_SAME_TOKENIZER}")
    if part.place == "first_rank":
        run = second_network_run(config, part.ckpt, REWARD_MODEL_KEY)
        model = None
        if policy.world.rank == 0:
            dispatcher = LocalDispatcher(run.model.num_routed_experts)
            model = Transformer(run.model, dispatcher, weight_dtype(config.precision)).to(policy.world.device)
            open_source(part.ckpt, REWARD_MODEL_KEY, drop_mtp=True).fill(named_tensors(model))
        return WholeRater(run.model.max_position_tokens, policy.world, part.batch_size, model)
    replica = _open_frozen(config, part.ckpt, REWARD_MODEL_KEY, policy)
    longest = min(config.batch.sequence_length_tokens, replica.config.model.max_position_tokens)
    return PipelinedRater(longest, replica, tokenizer.special.pad)


def _open_frozen(config: TrainConfig, path: str, key: str, policy: Replica) -> Replica:
    """Opens a second network on all ranks, under the policy's schedule, and loads its weights."""
    run = second_network_run(config, path, key)
    cut = run_cut(run, policy.schedule.placement)
    replica = open_replica(policy.world, ReplicaConfig.of_run(run), policy.schedule, cut, is_proven=True)
    open_source(path, key, drop_mtp=True).fill(named_tensors(replica.network))
    return replica


@dataclass(frozen=True, slots=True)
class QuestionedModel:
    """A reward model that reads a question instead of the prompt, such as one with the expected answer."""

    model: RewardModelPart
    question: str
    form: PromptForm

    def score(self, groups: Sequence[Group], step: int) -> list[list[Score]]:
        """Implements `ModelPart.score`."""
        return self.model.score([replace(group, tokens=self._tokens(group)) for group in groups], step)

    def _tokens(self, group: Group) -> tuple[int, ...]:
        problem = group.problem
        text = fill_fields(self.question, prompt=problem.prompt, expected=problem.answer or "")
        return self.form.encode([user(text)])

    def close(self) -> None:
        """Implements `ModelPart.close`."""
        self.model.close()


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
    """Votes of a judge that an engine samples critiques for."""

    judge: Judge
    engine: Engine
    seed: int
    stop: frozenset[int]
    opened: TrainingEngine | None = None
    replica: Replica | None = None

    def score(self, groups: Sequence[Group], step: int) -> list[list[Score]]:
        """Implements `ModelPart.score`."""
        prompts = self.judge.prompts(groups, [group.number for group in groups])
        critiques: Sequence[Sample] = ()
        if prompts:
            request = self.judge.request(self.seed, step, self.stop)
            critiques = self.engine.generate([prompt.prompt for prompt in prompts], request).rollouts
        return self.judge.scores(groups, prompts, critiques)

    def close(self) -> None:
        """Implements `ModelPart.close`."""
        if self.opened is not None:
            self.opened.close()
        if self.replica is not None:
            self.replica.close()


def open_model_parts(
    config: TrainConfig, policy: Replica, reference: Replica | None, engine: Engine, form: PromptForm
) -> Mapping[str, ModelPart]:
    """Opens the parts of a run's reward that need models, by name. All ranks call it."""
    assert config.reward is not None
    parts: dict[str, ModelPart] = {}
    for number, (name, part) in enumerate(config.reward.named_parts.items()):
        match part:
            case JudgeConfig():
                parts[name] = _open_judge(config, part, number, policy, reference, engine, form)
            case RewardModelScorerConfig():
                opened = open_reward_model(config, part, policy, form.tokenizer)
                parts[name] = opened if part.question is None else QuestionedModel(opened, part.question, form)
            case ScorerConfig():
                pass
    return parts


def _open_judge(
    config: TrainConfig,
    part: JudgeConfig,
    number: int,
    policy: Replica,
    reference: Replica | None,
    engine: Engine,
    form: PromptForm,
) -> JudgePart:
    """Opens a judge: the policy, its reference, or a second network, which is closed with the part."""
    replica = None
    if part.ckpt is not None:
        check_same_tokenizer(part.ckpt, JUDGE_KEY, form.tokenizer, f"a judge {_SAME_TOKENIZER}")
        replica = _open_frozen(config, part.ckpt, JUDGE_KEY, policy)
    model = config.model if replica is None else replica.config.model
    longest = max(1, model.max_position_tokens - part.max_new_tokens)
    judge = Judge(part, form.template, form.tokenizer, part.constitution, longest, number)
    stop = frozenset([form.tokenizer.special.eos])
    if part.weights == "policy":
        return JudgePart(judge=judge, engine=engine, seed=config.seed, stop=stop)
    frozen = replica or reference
    assert frozen is not None
    opened = ReplicaEngine(frozen)
    return JudgePart(judge=judge, engine=opened, seed=config.seed, stop=stop, opened=opened, replica=replica)


def with_constitutions(config: RewardConfig, world: World) -> RewardConfig:
    """Returns a reward with the text of its judges' constitutions. Rank 0 reads the files."""
    result: RewardConfig | ScoringError = config
    if world.rank == 0:
        try:
            result = replace(config, parts=tuple(_with_text(part) for part in config.parts))
        except ScoringError as error:
            result = error
    with world.phase("constitution of the judge"):
        result = broadcast_first(result, world.groups.world)
    if isinstance(result, ScoringError):
        raise result
    return result


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
        parts = self._config.named_parts
        models = {
            name: score_judged(parts[name], groups, partial(part.score, step=step))
            for name, part in self._models.items()
        }
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
        scored = None if self.host is None else self.host.result()
        with self.world.phase("scores of the answers"):
            outcome = broadcast_first(scored, self.world.groups.world)
        assert outcome is not None
        if outcome.error:
            raise ScoringError(outcome.error)
        joined = combine(self.config, self.groups, outcome.sheets, self.models)
        return [_with_sheets(group, sheets) for group, sheets in zip(self.groups, joined, strict=True)]


def _with_sheets(group: Group, scored: GroupSheets) -> Group:
    answers = tuple(replace(answer, sheet=sheet) for answer, sheet in zip(group.answers, scored.sheets, strict=True))
    return replace(group, answers=answers, dropped=f"{NO_VERDICT}: {scored.dropped}" if scored.dropped else "")
