"""Checks frozen networks of a run: teachers and reward models. No torch here."""

from dataclasses import replace

from comm.config import Cut
from infer.scoring.scorers import JudgeConfig, RewardModelScorerConfig, read_constitution
from model.config import ModelConfig
from train.checkpoint.sources import source_config
from train.config import TrainConfig
from train.errors import ConfigError, divisors

REWARD_MODEL_KEY = "reward.parts, kind reward_model: ckpt"


def second_network_run(config: TrainConfig, path: str, key: str) -> TrainConfig:
    """Returns the run with the architecture of a second network, without MTP modules."""
    model = source_config(path, key, drop_mtp=True)
    # The cut of the run's own layers does not fit other layers.
    return replace(config, model=model, parallelism=replace(config.parallelism, cut=Cut("even")))


def check_second_network(config: TrainConfig, path: str, key: str, role: str) -> None:
    """Rejects a network with another vocabulary, and one that the run's layout cannot hold."""
    second = source_config(path, key, drop_mtp=True)
    if second.vocab_size != config.model.vocab_size:
        raise ConfigError(vocabulary_problem(config, second, path, key, role))
    stages = config.parallelism.pipeline * (config.schedule.chunks or 1)
    experts = config.parallelism.expert
    if second.num_layers < stages:
        raise ConfigError(
            f"{key}: must have at least {stages} layers, one for each stage of the pipeline, {path} has "
            f"{second.num_layers}; nearest valid: parallelism.pipeline={second.num_layers}"
        )
    if second.num_routed_experts % experts:
        raise ConfigError(
            f"{key}: its experts must be divisible by parallelism.expert={experts}, {path} has "
            f"{second.num_routed_experts}; nearest valid: "
            f"parallelism.expert={divisors(second.num_routed_experts, experts)}"
        )


def vocabulary_problem(config: TrainConfig, second: ModelConfig, path: str, key: str, role: str) -> str:
    """Returns the message of an error about a vocabulary. Arguments as in `check_second_network`."""
    return (
        f"{key}: must have the vocabulary of the model, {config.model.vocab_size} tokens, {path} has "
        f"{second.vocab_size}; nearest valid: {role} with the same tokenizer"
    )


def check_reward_model(config: TrainConfig, part: RewardModelScorerConfig) -> None:
    """Rejects weights that are no reward model or do not fit the run."""
    found = source_config(part.ckpt, REWARD_MODEL_KEY, drop_mtp=True)
    if found.head != "score":
        raise ConfigError(
            f"{REWARD_MODEL_KEY}: must be a reward model, which has a head for scores, {part.ckpt} has a head for "
            f"{found.head}; nearest valid: a checkpoint of task=reward_model, or kind judge"
        )
    if part.place == "pipeline":
        check_second_network(config, part.ckpt, REWARD_MODEL_KEY, "a reward model")
    elif found.vocab_size != config.model.vocab_size:
        raise ConfigError(vocabulary_problem(config, found, part.ckpt, REWARD_MODEL_KEY, "a reward model"))


def reward_model_runs(config: TrainConfig) -> list[TrainConfig]:
    """Returns the run with the architecture of each reward model in its pipeline."""
    parts = () if config.reward is None else config.reward.parts
    return [
        second_network_run(config, part.ckpt, REWARD_MODEL_KEY)
        for part in parts
        if isinstance(part, RewardModelScorerConfig) and part.place == "pipeline"
    ]


def check_model_parts(config: TrainConfig) -> None:
    """Rejects weights of a reward model, and a constitution of a judge, that cannot be used."""
    for part in () if config.reward is None else config.reward.parts:
        match part:
            case RewardModelScorerConfig():
                check_reward_model(config, part)
            case JudgeConfig():
                read_constitution(part)
            case _:
                pass
