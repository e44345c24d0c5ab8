"""Computes the cost of a run and its later stages in GPU-hours, money, days and energy. No torch here."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from dualpipe.ir import Schedule
from train.config import TrainConfig
from train.planner.config import EfficiencyConfig, Rates
from train.planner.timing import StepTime, time_plan

_HOUR = 3600.0
_DAY_HOURS = 24.0
_TRILLION = 1e12
_LARGEST_EXPONENT = 700.0


@dataclass(frozen=True, kw_only=True, slots=True)
class StageCost:
    """The cost of one training stage.

    It is the run itself, named for its task, context_extension or post_training. `note` is what the figure rests on.
    Tokens are None if unknown, dollars without a price, and kilowatt-hours without the power of a GPU.
    """

    name: str
    tokens: int | None
    gpu_hours: float
    dollars: float | None
    days: float
    kilowatt_hours: float | None
    note: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Goodput:
    """The share of the time in which a run makes progress that is kept.

    Attributes:
        share: without checkpoints, restarts and repeated steps.
        job_mtbf_hours: mean time between failures of the whole job.
        checkpoint_interval_seconds: from one checkpoint to the next, as configured.
        best_interval_seconds: interval with the least loss (Young's approximation); None if checkpoints take no time.
    """

    share: float
    job_mtbf_hours: float
    checkpoint_interval_seconds: float
    best_interval_seconds: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class JobCost:
    """The cost of all training stages.

    GPU-hours are divided by the share of the goodput, which is None if the time between failures is unknown.
    """

    gpu_hours_per_trillion_tokens: float
    stages: tuple[StageCost, ...]
    goodput: Goodput | None

    @property
    def gpu_hours(self) -> float:
        """The GPU-hours of all stages."""
        return sum(stage.gpu_hours for stage in self.stages)

    @property
    def dollars(self) -> float | None:
        """The price of all stages; None without a price."""
        return _sum_if_known(stage.dollars for stage in self.stages)

    @property
    def kilowatt_hours(self) -> float | None:
        """The energy of all stages; None without the power of a GPU."""
        return _sum_if_known(stage.kilowatt_hours for stage in self.stages)


def _sum_if_known(values: Iterable[float | None]) -> float | None:
    known = list(values)
    return None if None in known else sum(filter(None, known))


def job_cost(
    config: TrainConfig,
    rates: Rates,
    efficiency: EfficiencyConfig,
    time: StepTime,
    schedule: Schedule | None = None,
) -> JobCost:
    """Returns the cost of a run and of the stages in `config.cost`.

    Every step is priced as one of the largest batch: a token of a ramp's smaller batches costs the same. In stages with
    longer sequences, ranks share each sequence, so that a micro-batch has as many tokens on each rank as the run's. The
    layout that DeepSeek-V3 used for them is unknown.

    Args:
        schedule: order that longer sequences use; None: one is built for their costs.

    Raises:
        ScheduleError: a schedule for longer sequences cannot be built.
    """
    ranks = config.parallelism.world_size
    goodput = _goodput(config, time)
    share = 1.0 if goodput is None else goodput.share
    per_token = 1 / (time.tokens_per_second_per_gpu * _HOUR)
    tokens = config.batch_sizes.tokens_before(config.task.steps)
    stages = [_stage(config, config.task.kind, tokens, tokens * per_token / share, "steps of the largest batch")]
    if config.cost.context_extension:
        step_tokens = config.batch.global_sequences * config.batch.sequence_length_tokens
        hours = 0.0
        longer = 0
        for stage in config.cost.context_extension:
            step = time_plan(rates, efficiency, config, stage.sequence_length_tokens, schedule).time.step
            hours += step * ranks / _HOUR * stage.tokens / step_tokens / share
            longer += stage.tokens
        lengths = " and ".join(f"{stage.sequence_length_tokens:,}" for stage in config.cost.context_extension)
        note = f"sequences of {lengths} tokens, each shared by ranks; the layout of the published run is unknown"
        stages.append(_stage(config, "context_extension", longer, hours, note))
    if config.cost.post_training_gpu_hours:
        given = config.cost.post_training_gpu_hours
        stages.append(_stage(config, "post_training", None, given, "cost.post_training_gpu_hours, an input"))
    return JobCost(gpu_hours_per_trillion_tokens=per_token * _TRILLION / share, stages=tuple(stages), goodput=goodput)


def _stage(config: TrainConfig, name: str, tokens: int | None, gpu_hours: float, note: str) -> StageCost:
    price = config.cluster.dollars_per_gpu_hour
    watts = config.cost.watts_per_gpu
    return StageCost(
        name=name,
        tokens=tokens,
        gpu_hours=gpu_hours,
        dollars=None if price is None else gpu_hours * price,
        days=gpu_hours / config.parallelism.world_size / _DAY_HOURS,
        kilowatt_hours=None if watts is None else gpu_hours * watts / 1000,
        note=note,
    )


def _goodput(config: TrainConfig, time: StepTime) -> Goodput | None:
    """Returns the goodput if a failure repeats the steps since the last checkpoint, after a restart."""
    cost = config.cost
    mtbf = config.cost.gpu_mtbf_hours
    if mtbf is None:
        return None
    job_seconds = mtbf * _HOUR / config.parallelism.world_size
    steps = config.checkpointing.every_steps or config.task.steps
    interval = steps * time.step
    # Failures arrive at a constant rate, and each repeats the interval: an interval of length t takes
    # mtbf (exp(t / mtbf) - 1) in the mean, with exp(t / mtbf) - 1 failures.
    failures = math.expm1(min(_LARGEST_EXPONENT, (interval + cost.checkpoint_seconds) / job_seconds))
    share = interval / (failures * (job_seconds + cost.restart_seconds))
    best = math.sqrt(2 * cost.checkpoint_seconds * job_seconds) if cost.checkpoint_seconds else None
    return Goodput(
        share=share,
        job_mtbf_hours=job_seconds / _HOUR,
        checkpoint_interval_seconds=interval,
        best_interval_seconds=best,
    )
