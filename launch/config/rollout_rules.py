"""Rules of runs that learn from the rewards of sampled answers. Reads no files."""

from data.chat.templates import CHAT_TEMPLATES
from data.registry import DATA_SOURCES
from infer.scoring.judge import JudgeConfig
from launch.config.errors import check_all
from train.config import TrainConfig
from train.config.errors import ConfigError, broken, divisors
from train.tasks.registry import TASKS


def check_rollouts(config: TrainConfig) -> None:
    """Rejects rollouts that a task does not use or lacks, and sizes that do not fit."""
    kind, rollouts = config.task.kind, config.rollout
    if TASKS.get(kind).has_rollouts:
        if rollouts is None:
            raise broken("rollout", f"must have values with task={kind}", "null", "rollout=default")
        check_all(config, _check_reward, _check_source, _check_sizes, _check_batch)
        return
    for key, value in (("rollout", rollouts), ("reward", config.reward)):
        if value is not None:
            users = ", ".join(f"task={name}" for name, spec in TASKS.items() if spec.has_rollouts)
            raise ConfigError(
                f"{key}: must be null with task={kind}, which learns from no rewards, has values; nearest valid: "
                f"{key}=none, or {users}"
            )


def _check_reward(config: TrainConfig) -> None:
    if config.reward is None:
        raise broken("reward", f"must have values with task={config.task.kind}", "null", "reward=exact")
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
        packed = "answers that are packed into one sequence must not attend to each other"
        raise broken("batch.document_mask", f"must be true for task.kind={kind}, because {packed}", "false", "true")


def _check_source(config: TrainConfig) -> None:
    kind = config.data.source.kind
    if DATA_SOURCES.get(kind).problems is None:
        valid = " or ".join(f"data={name}" for name, entry in DATA_SOURCES.items() if entry.problems is not None)
        rule = f"must be a source with problems for task.kind={config.task.kind}"
        raise broken("data.kind", rule, kind, valid)


def _check_judge(config: TrainConfig, judge: JudgeConfig) -> None:
    place, most = "reward.parts, kind judge", config.model.max_position_tokens
    if judge.weights == "reference" and not TASKS.get(config.task.kind).has_reference(config.task):
        rule = "weights must be policy if the run has no reference"
        raise broken(place, rule, "reference", "policy, or task.loss.kl_weight above 0")
    if judge.max_new_tokens >= most:
        rule = f"max_new_tokens must be below model.max_position_tokens={most}, which also hold the question"
        raise broken(place, rule, judge.max_new_tokens, most // 2)
    template = DATA_SOURCES.get(config.data.source.kind).chat_template
    if judge.thinking and template is not None:
        name = template(config.data.source)
        if CHAT_TEMPLATES.get(name).thoughts is None:
            rule = f"thinking must be false with data.template={name}, which has no thoughts"
            raise broken(place, rule, "true", "false")


def _check_sizes(config: TrainConfig) -> None:
    rollout, length = config.rollout, config.batch.sequence_length_tokens
    assert rollout is not None
    if rollout.samples < 2:
        rule = "must be at least 2, because an answer is compared with the others to its prompt"
        raise broken("rollout.samples", rule, rollout.samples, 2)
    limit = rollout.max_new_tokens
    if limit >= length:
        rule = f"must be below batch.sequence_length_tokens={length}, which also holds the prompt"
        raise broken("rollout.max_new_tokens", rule, limit, length - 1)
    if rollout.prompts % rollout.updates:
        rule, near = f"must divide rollout.prompts={rollout.prompts}", divisors(rollout.prompts, rollout.updates)
        raise broken("rollout.updates", rule, rollout.updates, near)
    if rollout.length_penalty_tokens > limit:
        rule = f"must be at most rollout.max_new_tokens={limit}"
        raise broken("rollout.length_penalty_tokens", rule, rollout.length_penalty_tokens, limit)
    if rollout.engine == "local" and rollout.keep_routing:
        records = "records experts on other ranks than training expects"
        rule = f"must be false with rollout.engine=local, which {records}"
        raise broken("rollout.keep_routing", rule, "true", "false, or rollout.engine=pipelined")
