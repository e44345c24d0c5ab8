"""Opens what samples answers for a run."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from data.chat.templates import CHAT_TEMPLATES
from data.prepare import Prepared
from data.problems.records import ProblemRecord
from data.problems.split import split_problems
from data.registry import DATA_SOURCES
from infer.engines.protocol import NumberedPrompt
from train.config import TrainConfig
from train.config.decode import encode
from train.config.errors import ConfigError
from train.replica import Replica
from train.rollout.config import RolloutConfig, RolloutLimits
from train.rollout.engine import ReplicaEngine, TrainingEngine
from train.rollout.gathered import GatheredEngine
from train.rollout.groups.draw import DrawnPrompt, PromptForm, PromptOrder
from train.rollout.groups.held_out import HeldOutProblems
from train.rollout.groups.make import RolloutMaker
from train.rollout.groups.policy import JournalPlace, PolicySampler
from train.rollout.model_parts import open_model_parts, with_constitutions
from train.rollout.rewards import RolloutRewards
from train.rollout.step_batch import StepSampler
from train.rollout.student import open_student_sampler
from train.tasks.grpo import GrpoConfig
from train.tasks.registry import open_task

_NO_LIMITS = RolloutLimits(
    kl=None, cut_share=None, equal_steps=None, entropy_share=None, reward_share=None, window_steps=1
)


def open_sampler(
    config: TrainConfig, replica: Replica, prepared: Prepared, reference: Replica | None = None
) -> StepSampler | None:
    """Opens the sampler of a run that trains on sampled answers; None: it trains on its data alone.

    All ranks call it.

    Args:
        config: of the run.
        replica: the network that the run trains.
        prepared: tokenizer and fingerprint of the data.
        reference: frozen network of the run's divergence; None: it has none.

    Raises:
        ConfigError: on every rank, if no problem has room for an answer.
        ScoringError: this machine cannot run a scorer.
        CheckpointError, HfError: a reward model cannot be read, or has another tokenizer.
    """
    if config.rollout is None:
        return open_student_sampler(config, replica)
    assert isinstance(config.task, GrpoConfig)
    assert config.reward is not None
    reward = with_constitutions(config.reward, replica.world)
    scored = replace(config, reward=reward)
    rollouts, form = config.rollout, _form(config, prepared)
    engine: TrainingEngine = GatheredEngine(replica) if rollouts.engine == "local" else ReplicaEngine(replica)
    train, held_out = split_problems(config.data)
    room = config.batch.sequence_length_tokens - rollouts.max_new_tokens
    maker = RolloutMaker(
        rollouts,
        engine,
        RolloutRewards(reward, replica.world, open_model_parts(scored, replica, reference, engine, form)),
        PromptOrder(_fitting(train, form, room), form, config.data.seed),
        form,
        advantage=config.task.loss.advantage,
        seed=config.seed,
    )
    return PolicySampler(
        replica,
        open_task(config.task, config.model, config.batch),
        maker,
        _open_held_out(rollouts, held_out, form, room),
        JournalPlace(
            out_dir=Path(config.out_dir),
            resumed=None if config.resume is None else Path(config.resume).parents[1],
            settings=_digest(scored, prepared.fingerprint),
        ),
        config=rollouts,
    )


def _form(config: TrainConfig, prepared: Prepared) -> PromptForm:
    entry = DATA_SOURCES.get(config.data.source.kind)
    assert config.rollout is not None
    assert entry.chat_template is not None
    template = CHAT_TEMPLATES.get(entry.chat_template(config.data.source))
    thinking = template.thinks if config.rollout.thinking is None else config.rollout.thinking
    return PromptForm(template=template, tokenizer=prepared.tokenizer, thinking=thinking)


def _fitting(problems: Sequence[ProblemRecord], form: PromptForm, room: int) -> list[ProblemRecord]:
    """Returns the problems whose prompts leave room for an answer."""
    fitting = [problem for problem in problems if len(form.tokens(problem)) <= room]
    if not fitting:
        raise ConfigError(
            f"rollout.max_new_tokens: must leave room for a prompt in batch.sequence_length_tokens, leaves {room} "
            f"tokens, and none of {len(problems)} prompts has so few; nearest valid: a larger "
            f"batch.sequence_length_tokens"
        )
    return fitting


def _open_held_out(
    config: RolloutConfig, problems: Sequence[ProblemRecord], form: PromptForm, room: int
) -> HeldOutProblems | None:
    fitting = [problem for problem in problems if len(form.tokens(problem)) <= room][: config.held_out]
    drawn = [
        DrawnPrompt(problem=problem, prompt=NumberedPrompt(number=number, tokens=form.tokens(problem)))
        for number, problem in enumerate(fitting)
    ]
    return HeldOutProblems(drawn, config.held_out_samples) if drawn else None


def _digest(config: TrainConfig, data_fingerprint: str) -> str:
    """Returns a digest of what decides the answers and rewards, besides weights and numbers."""
    assert config.rollout is not None
    assert config.reward is not None
    # These change no answer and no reward.
    rollouts = replace(config.rollout, held_out=0, held_out_samples=1, limits=_NO_LIMITS)
    content = [encode(rollouts), encode(config.reward.parts), data_fingerprint, config.seed, config.data.seed]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
