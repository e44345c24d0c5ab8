"""Rules of runs that learn from the rewards of sampled answers. Reads no files."""

from data.chat.templates import CHAT_TEMPLATES
from data.registry import DATA_SOURCES
from infer.scoring.judge import JudgeConfig
from launch.config.errors import check_all
from train.config import TrainConfig
from train.config.errors import ConfigError, divisors
from train.tasks.registry import TASKS


def check_rollouts(config: TrainConfig) -> None:
    """Rejects rollouts that a task does not use or lacks, and sizes that do not fit."""
    kind, rollouts = config.task.kind, config.rollout
    if not TASKS.get(kind).has_rollouts:
        for key, value in (("rollout", rollouts), ("reward", config.reward)):
            if value is not None:
                users = ", ".join(f"task={name}" for name, spec in TASKS.items() if spec.has_rollouts)
                raise ConfigError(
                    f"{key}: must be null with task={kind}, which learns from no rewards, has values; nearest valid: "
                    f"{key}=none, or {users}"
                )
        return
    if rollouts is None:
        raise ConfigError(f"rollout: must have values with task={kind}, is null; nearest valid: rollout=default")
    check_all(config, _check_reward, _check_source, _check_sizes, _check_batch)


def _check_reward(config: TrainConfig) -> None:
    kind = config.task.kind
    if config.reward is None:
        raise ConfigError(f"reward: must have values with task={kind}, is null; nearest valid: reward=exact")
    for part in config.reward.parts:
        if isinstance(part, JudgeConfig):
            _check_judge(config, part)


def _check_batch(config: TrainConfig) -> None:
    kind = config.task.kind
    if config.batch.ramp is not None:
        raise ConfigError(
            f"batch.ramp: must be null with task={kind}, whose batches are as many as the answers need, has values; "
            f"nearest valid: batch.ramp=null"
        )
    if not config.batch.document_mask:
        raise ConfigError(
            f"batch.document_mask: must be true for task.kind={kind}, because answers that are packed into one "
            f"sequence must not attend to each other, is false; nearest valid: true"
        )


def _check_source(config: TrainConfig) -> None:
    kind = config.data.source.kind
    if DATA_SOURCES.get(kind).problems is None:
        valid = [name for name, entry in DATA_SOURCES.items() if entry.problems is not None]
        raise ConfigError(
            f"data.kind: must be a source with problems for task.kind={config.task.kind}, is {kind}; nearest valid: "
            f"{' or '.join(f'data={name}' for name in valid)}"
        )


def _check_judge(config: TrainConfig, judge: JudgeConfig) -> None:
    place = "reward.parts, kind judge:"
    if judge.weights == "reference" and not TASKS.get(config.task.kind).has_reference(config.task):
        raise ConfigError(
            f"{place} weights must be policy if the run has no reference, is reference; nearest valid: policy, or "
            f"task.loss.kl_weight above 0"
        )
    if judge.max_new_tokens >= config.model.max_position_tokens:
        raise ConfigError(
            f"{place} max_new_tokens must be below model.max_position_tokens={config.model.max_position_tokens}, which "
            f"also hold the question, is {judge.max_new_tokens}; nearest valid: {config.model.max_position_tokens // 2}"
        )
    template = DATA_SOURCES.get(config.data.source.kind).chat_template
    if judge.thinking and template is not None:
        name = template(config.data.source)
        if CHAT_TEMPLATES.get(name).thoughts is None:
            raise ConfigError(
                f"{place} thinking must be false with data.template={name}, which has no thoughts, is true; nearest "
                f"valid: false"
            )


def _check_sizes(run: TrainConfig) -> None:
    config, length = run.rollout, run.batch.sequence_length_tokens
    assert config is not None
    if config.samples < 2:
        raise ConfigError(
            f"rollout.samples: must be at least 2, because an answer is compared with the others to its prompt, is "
            f"{config.samples}; nearest valid: 2"
        )
    if config.max_new_tokens >= length:
        raise ConfigError(
            f"rollout.max_new_tokens: must be below batch.sequence_length_tokens={length}, which also holds the "
            f"prompt, is {config.max_new_tokens}; nearest valid: {length - 1}"
        )
    if config.prompts % config.updates:
        raise ConfigError(
            f"rollout.updates: must divide rollout.prompts={config.prompts}, is {config.updates}; nearest valid: "
            f"{divisors(config.prompts, config.updates)}"
        )
    if config.length_penalty_tokens > config.max_new_tokens:
        raise ConfigError(
            f"rollout.length_penalty_tokens: must be at most rollout.max_new_tokens={config.max_new_tokens}, is "
            f"{config.length_penalty_tokens}; nearest valid: {config.max_new_tokens}"
        )
    if config.engine == "local" and config.keep_routing:
        raise ConfigError(
            "rollout.keep_routing: must be false with rollout.engine=local, which records experts on other ranks than "
            "training expects, is true; nearest valid: false, or rollout.engine=pipelined"
        )
