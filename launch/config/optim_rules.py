"""What a run's optimiser can be. No torch here."""

from importlib.util import find_spec
from itertools import pairwise

from launch.config.errors import ConfigError
from train.config import TrainConfig
from train.optim.config import DecayedRate, Span, V3Rate
from train.optim.learning_rate import span_tokens

_SCHEDULE = "optim.schedule"

# 1 - 2^-6. Half a step of bf16 is at most 2^-8 of a number: a moment still follows what differs from it by a quarter.
_MOST_BETA_OF_BF16 = 0.984375


def check_optim(config: TrainConfig) -> None:
    """Refuses a learning rate, a sharding or moments that the run cannot have.

    Raises:
        ConfigError: names the key, the rule, the value and the nearest valid one.
    """
    optim, precision = config.optim, config.precision.kind
    _check_schedule(config)
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


def _check_schedule(config: TrainConfig) -> None:
    """Refuses spans that are out of order and rates that rise."""
    schedule, peak = config.optim.schedule, config.optim.learning_rate
    if isinstance(schedule, DecayedRate | V3Rate):
        _check_order(config, ("decay_start", schedule.decay_start), ("decay_end", schedule.decay_end))
        if _tokens(config, schedule.warmup) <= _tokens(config, Span(amount=100, unit="%")):
            _check_order(config, ("warmup", schedule.warmup), ("decay_end", schedule.decay_end))
    if isinstance(schedule, V3Rate):
        _check_order(config, ("decay_end", schedule.decay_end), ("last_start", schedule.last_start))
        rates = (
            ("optim.learning_rate", peak),
            (f"{_SCHEDULE}.final_learning_rate", schedule.final_learning_rate),
            (f"{_SCHEDULE}.last_learning_rate", schedule.last_learning_rate),
        )
        for (above, most), (key, rate) in pairwise(rates):
            if rate > most:
                raise ConfigError(f"{key}: must be at most {above}={most}, is {rate}; nearest valid: {most}")


def _check_order(config: TrainConfig, first: tuple[str, Span], second: tuple[str, Span]) -> None:
    (name, span), (other, later) = first, second
    if _tokens(config, span) > _tokens(config, later):
        raise ConfigError(
            f"{_SCHEDULE}.{name}: must be at most {_SCHEDULE}.{other}={later.to_plain()} of "
            f"{config.task.steps} steps, is {span.to_plain()}; nearest valid: {later.to_plain()}"
        )


def _tokens(config: TrainConfig, span: Span) -> float:
    return span_tokens(span, config.batch_sizes, config.task.steps)


def _check_bf16_moments(config: TrainConfig) -> None:
    if config.precision.kind == "float64":
        raise ConfigError("optim.moments: precision=float64 needs float32, is bf16; nearest valid: float32")
    for name, beta in (("beta1", config.optim.beta1), ("beta2", config.optim.beta2)):
        if beta > _MOST_BETA_OF_BF16:
            raise ConfigError(
                f"optim.{name}: must be at most {_MOST_BETA_OF_BF16} with optim.moments=bf16, as smaller changes "
                f"are lost in its steps, is {beta}; nearest valid: {_MOST_BETA_OF_BF16}, or optim.moments=float32"
            )
