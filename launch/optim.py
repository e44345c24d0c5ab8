"""What a run's optimiser can be. No torch here."""

from launch.errors import ConfigError
from train.config import OptimConfig, StepOptimConfig, TrainConfig

# 1 - 2^-6. Half a step of bf16 is at most 2^-8 of a number: a moment still follows what differs from it by a quarter.
_MOST_BETA_OF_BF16 = 0.984375


def check_optim(config: TrainConfig) -> None:
    """Refuses a learning rate, a sharding or moments that the run cannot have.

    Raises:
        ConfigError: names the key, the rule, the value and the nearest valid one.
    """
    optim, precision = config.optim, config.precision.kind
    if optim.final_learning_rate > optim.learning_rate:
        raise ConfigError(
            f"optim.final_learning_rate: must be at most optim.learning_rate={optim.learning_rate}, "
            f"is {optim.final_learning_rate}; nearest valid: {optim.learning_rate}"
        )
    _check_spans(optim)
    needed = {"float64": "replicated", "bf16": "zero1", "fp8": "zero1"}.get(precision, optim.sharding)
    if optim.sharding != needed:
        raise ConfigError(
            f"optim.sharding: precision={precision} needs {needed}, is {optim.sharding}; nearest valid: {needed}"
        )
    if optim.moments == "bf16":
        _check_bf16_moments(config)


def _check_spans(optim: OptimConfig) -> None:
    if isinstance(optim, StepOptimConfig):
        if not optim.warmup_steps <= optim.decay_start_step <= optim.decay_end_step:
            raise ConfigError(
                f"optim.decay_start_step: must lie between optim.warmup_steps={optim.warmup_steps} and "
                f"optim.decay_end_step={optim.decay_end_step}, is {optim.decay_start_step}"
            )
        return
    if not optim.decay_start_tokens <= optim.decay_end_tokens <= optim.last_start_tokens:
        raise ConfigError(
            f"optim.decay_end_tokens: must lie between optim.decay_start_tokens={optim.decay_start_tokens} and "
            f"optim.last_start_tokens={optim.last_start_tokens}, is {optim.decay_end_tokens}"
        )
    if optim.last_learning_rate > optim.final_learning_rate:
        raise ConfigError(
            f"optim.last_learning_rate: must be at most optim.final_learning_rate={optim.final_learning_rate}, "
            f"is {optim.last_learning_rate}; nearest valid: {optim.final_learning_rate}"
        )


def _check_bf16_moments(config: TrainConfig) -> None:
    if config.precision.kind == "float64":
        raise ConfigError("optim.moments: precision=float64 needs float32, is bf16; nearest valid: float32")
    for name, beta in (("beta1", config.optim.beta1), ("beta2", config.optim.beta2)):
        if beta > _MOST_BETA_OF_BF16:
            raise ConfigError(
                f"optim.{name}: must be at most {_MOST_BETA_OF_BF16} with optim.moments=bf16, as smaller changes "
                f"are lost in its steps, is {beta}; nearest valid: {_MOST_BETA_OF_BF16}, or optim.moments=float32"
            )
