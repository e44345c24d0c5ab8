"""What a ramp of the global batch can be. No torch here."""

from data.batch_sizes import BatchRamp, ramp_sizes
from dualpipe.ir import ScheduleError
from dualpipe.registry import check_size
from train.config import TrainConfig
from train.config.errors import ConfigError, multiples

_KEY = "batch.ramp"


def check_ramp(config: TrainConfig) -> None:
    """Refuses a ramp with a size that ranks, micro-batches or the schedule cannot take.

    Raises:
        ConfigError: names the key, the rule, the value and the nearest valid one.
    """
    ramp, last = config.batch.ramp, config.batch.global_sequences
    if ramp is None:
        return
    if not 2 <= ramp.num_sizes <= last:
        raise ConfigError(
            f"{_KEY}.num_sizes: must be at least 2, the last of which is batch.global_sequences={last}, and at "
            f"most that, is {ramp.num_sizes}; nearest valid: {2 if ramp.num_sizes < 2 else last}, or {_KEY}=null"
        )
    if ramp.start_sequences >= last:
        raise ConfigError(
            f"{_KEY}.start_sequences: must be below batch.global_sequences={last}, is {ramp.start_sequences}; "
            f"nearest valid: {last - 1}, or {_KEY}=null"
        )
    if config.schedule.kind == "auto":
        raise ConfigError(
            "schedule.kind: must name a schedule beside batch.ramp, as auto measures for one size, is auto; "
            "nearest valid: schedule=dualpipe_split"
        )
    _check_sizes(config, ramp)


def _check_sizes(config: TrainConfig, ramp: BatchRamp) -> None:
    batch, parallelism, kind = config.batch, config.parallelism, config.schedule.kind
    share = parallelism.data * batch.micro_sequences
    for size in ramp_sizes(batch.global_sequences, ramp):
        if size % share:
            raise ConfigError(
                f"{_KEY}: every size must be divisible by parallelism.data x batch.micro_sequences = {share}, "
                f"one is {size}; nearest valid: start_sequences={multiples(ramp.start_sequences, share)}, and a growth "
                f"of (num_sizes - 1) x {share} or a multiple of it"
            )
        try:
            check_size(kind, parallelism.pipeline, size // share, micro_batches_key=_KEY)
        except ScheduleError as error:
            raise ConfigError(f"{error}; a size of {size} sequences has {size // share} micro-batches") from error
