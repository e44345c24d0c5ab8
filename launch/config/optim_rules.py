"""What a run's optimiser can be. No torch here."""

from importlib.util import find_spec

from train.config import TrainConfig
from train.config.errors import ConfigError
from train.optim.learning_rate import RateError, check_schedule

# 1 - 2^-6. Half a step of bf16 is at most 2^-8 of a number: a moment still follows what differs from it by a quarter.
_MOST_BETA_OF_BF16 = 0.984375


def check_optim(config: TrainConfig) -> None:
    """Refuses a learning rate, a sharding or moments that the run cannot have.

    Raises:
        ConfigError: names the key, the rule, the value and the nearest valid one.
    """
    optim, precision = config.optim, config.precision.kind
    try:
        check_schedule(optim, config.batch_sizes, config.task.steps)
    except RateError as error:
        raise ConfigError(str(error)) from error
    needed = {"float64": "replicated", "bf16": "zero1", "fp8": "zero1"}.get(precision, optim.sharding)
    if optim.sharding != needed:
        raise ConfigError(
            f"optim.sharding: precision={precision} needs {needed}, is {optim.sharding}; nearest valid: {needed}"
        )
    if optim.sharding == "zero1" and find_spec("deepspeed") is None:
        nearest = "optim.sharding=replicated, or " if precision == "float32" else ""
        raise ConfigError(
            "optim.sharding: zero1 needs the package deepspeed, which is not installed; nearest valid: "
            f"{nearest}pip install deepspeed"
        )
    if optim.moments == "bf16":
        _check_bf16_moments(config)


def _check_bf16_moments(config: TrainConfig) -> None:
    if config.precision.kind == "float64":
        raise ConfigError("optim.moments: precision=float64 needs float32, is bf16; nearest valid: float32")
    for name, beta in (("beta1", config.optim.beta1), ("beta2", config.optim.beta2)):
        if beta > _MOST_BETA_OF_BF16:
            raise ConfigError(
                f"optim.{name}: must be at most {_MOST_BETA_OF_BF16} with optim.moments=bf16, as smaller changes "
                f"are lost in its steps, is {beta}; nearest valid: {_MOST_BETA_OF_BF16}, or optim.moments=float32"
            )
