"""Opens what samples answers for a run."""

import hashlib
import json
from collections.abc import Callable, Sequence
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
from train.rollout.config import RolloutConfig
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
from train.tasks.grpo import GrpoConfig, leaves_out_equal_groups
from train.tasks.registry import open_task


def open_sampler(
    config: TrainConfig,
    replica: Replica,
    prepared: Prepared,
    reference: Replica | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> StepSampler | None:
    """Opens the sampler of a run that trains on sampled answers; None: it trains on its data alone.

    All ranks call it.

    Args:
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
    rollouts = replace(config.rollout, drop_equal_groups=leaves_out_equal_groups(config))
    scored, form = replace(config, reward=reward, rollout=rollouts), _form(config, prepared)
    engine: TrainingEngine = GatheredEngine(replica) if rollouts.engine == "local" else ReplicaEngine(replica)
    train, held_out = _read_problems(config, rollouts, form, say)
    maker = RolloutMaker(
        rollouts,
        engine,
        RolloutRewards(reward, replica.world, open_model_parts(scored, replica, reference, engine, form)),
        PromptOrder(train, form, config.data.seed),
        form,
        advantage=config.task.loss.advantage,
        seed=config.seed,
    )
    return PolicySampler(
        replica,
        open_task(config.task, config.model, config.batch),
        maker,
        _open_held_out(rollouts, held_out, form),
        JournalPlace(
            out_dir=Path(config.out_dir),
            resumed=None if config.resume is None else Path(config.resume).parents[1],
            settings=_digest(scored, prepared.fingerprint),
        ),
        config=rollouts,
        loss=config.task.loss,
    )


def _form(config: TrainConfig, prepared: Prepared) -> PromptForm:
    entry = DATA_SOURCES.get(config.data.source.kind)
    assert config.rollout is not None
    assert entry.chat_template is not None
    template = CHAT_TEMPLATES.get(entry.chat_template(config.data.source))
    thinking = template.thinks if config.rollout.thinking is None else config.rollout.thinking
    return PromptForm(template=template, tokenizer=prepared.tokenizer, thinking=thinking)


def _read_problems(
    config: TrainConfig, rollouts: RolloutConfig, form: PromptForm, say: Callable[[str], object]
) -> tuple[list[ProblemRecord], list[ProblemRecord]]:
    """Returns the problems to train on and the held-out ones whose prompts leave room for an answer."""
    train, held_out = split_problems(config.data)
    room = config.batch.sequence_length_tokens - rollouts.max_new_tokens
    fitting, fitting_held_out = (
        [problem for problem in problems if len(form.tokens(problem)) <= room] for problems in (train, held_out)
    )
    if not fitting:
        raise ConfigError(
            f"rollout.max_new_tokens: must leave room for a prompt in batch.sequence_length_tokens, leaves {room} "
            f"tokens, and none of {len(train)} prompts has so few; nearest valid: a larger "
            f"batch.sequence_length_tokens"
        )
    if len(fitting) < len(train):
        say(f"problems: {len(train) - len(fitting):,} of {len(train):,} have too long prompts and are not trained")
    if len(fitting_held_out) < rollouts.held_out:
        say(
            f"held-out problems: {len(fitting_held_out)}, below rollout.held_out={rollouts.held_out}, because "
            f"data.validation_fraction={config.data.validation_fraction:g} holds out {len(held_out)} problems, "
            f"{len(held_out) - len(fitting_held_out)} of them with too long prompts; nearest: a larger fraction"
        )
    return fitting, fitting_held_out


def _open_held_out(config: RolloutConfig, fitting: Sequence[ProblemRecord], form: PromptForm) -> HeldOutProblems | None:
    drawn = [
        DrawnPrompt(problem=problem, prompt=NumberedPrompt(number=number, tokens=form.tokens(problem)))
        for number, problem in enumerate(fitting[: config.held_out])
    ]
    return HeldOutProblems(drawn, config.held_out_samples) if drawn else None


def _digest(config: TrainConfig, data_fingerprint: str) -> str:
    """Returns a digest of what decides the answers and rewards, besides weights and numbers."""
    assert config.rollout is not None
    assert config.reward is not None
    # Validations and limits change no answer and no reward.
    unused = ("held_out", "held_out_samples", "limits")
    rollouts = {key: value for key, value in encode(config.rollout).items() if key not in unused}
    content = [rollouts, encode(config.reward.parts), data_fingerprint, config.seed, config.data.seed]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
