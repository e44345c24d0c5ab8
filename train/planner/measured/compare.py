"""Compares the plan of a run with what the run has recorded. No torch here."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dualpipe.ir import Schedule
from train.config import TrainConfig
from train.config.errors import ConfigError
from train.memory import JobMemory, predict_memory
from train.planner.config import EfficiencyConfig
from train.planner.job_plan import JobPlan, PlannerConfig, plan_job, require_time
from train.planner.measured.rates import followed_run, run_rates
from train.planner.measured.record import MeasuredRun
from train.planner.measured.steps import RecordedStep, median_of, typical_steps
from train.planner.timing import TimedPlan, time_plan
from train.schedule.cut import with_cut

_LAST = 20
"""Steps at the end of a run on which the factor of the steps before them is checked."""
_NOT_ON_CPU = "not compared: on a CPU, the resident set also holds Python and torch, so it is no check"


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """A predicted number, the measured one, and measured over predicted; None if the prediction is 0."""

    name: str
    predicted: float
    measured: float

    @property
    def factor(self) -> float | None:
        """Measured over predicted."""
        return self.measured / self.predicted if self.predicted > 0 else None


@dataclass(frozen=True, kw_only=True, slots=True)
class LastSteps:
    """The factor of a run's earlier steps, checked on its last steps.

    Attributes:
        count: number of last steps.
        predicted: seconds of a step, with the factor of the steps before them.
        measured: median seconds of the last steps.
    """

    count: int
    predicted: float
    measured: float

    @property
    def difference(self) -> float:
        """How much longer the last steps took than predicted, as a share."""
        return self.measured / self.predicted - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A run's plan and its recorded steps.

    Times are in seconds, medians over steps and means over ranks.

    Attributes:
        folder: of the run.
        num_steps: steps of the largest batch that are compared.
        times: step, bubble, exposed exchange and time outside the passes.
        memory: largest peak of a rank in bytes, without the reserve; None on a CPU.
        memory_note: why there is no memory; empty if there is.
        factor: measured step over the predicted one without the declared factor.
        last: None for a run with few steps.
    """

    folder: str
    num_steps: int
    times: tuple[Compared, ...]
    memory: Compared | None
    memory_note: str
    factor: float
    last: LastSteps | None


def followed_config(config: TrainConfig, run: MeasuredRun) -> tuple[TrainConfig, Schedule | None]:
    """Returns a run's configuration with the schedule and the cut that it follows.

    Returns:
        The configuration, and the schedule; None if the record is of another batch size of a ramp.

    Raises:
        ConfigError: the record is not of a run with this configuration.
    """
    schedule, mesh = run.schedule, config.parallelism
    if schedule.num_ranks != mesh.pipeline or sum(run.measured.cut) != config.model.num_layers:
        raise ConfigError(
            f"run: its measurements must be of {mesh.pipeline} pipeline ranks and {config.model.num_layers} layers, as "
            f"its configuration is, are of {schedule.num_ranks} and {sum(run.measured.cut)}"
        )
    named = replace(config.schedule, kind=schedule.kind, chunks=schedule.num_stages // schedule.num_ranks)
    config = with_cut(replace(config, schedule=named), run.measured.cut_ranges)
    return config, schedule if schedule.num_micro_batches == config.num_micro_batches else None


def compare(config: TrainConfig, timed: TimedPlan, memory: JobMemory | None, folder: Path, device: str) -> Comparison:
    """Compares a plan with the recorded steps of its run.

    Args:
        memory: predicted memory; None: not compared.

    Raises:
        ConfigError: the run has recorded no step of its largest batch.
    """
    steps = typical_steps(folder)
    if not steps or steps[-1].sequences != config.batch.global_sequences:
        raise ConfigError(
            f"run: must have recorded a step of {config.batch.global_sequences:,} sequences in metrics.jsonl, "
            f"{str(folder)!r} has not; nearest valid: rates={folder}, which plans without a comparison"
        )
    step = median_of(steps, "step")
    on_device = None if memory is None or device == "cpu" else max(rank.total - rank.reserve for rank in memory.ranks)
    return Comparison(
        folder=str(folder),
        num_steps=len(steps),
        times=(Compared(name="step", predicted=timed.time.step, measured=step), *_parts(config, timed, steps)),
        memory=None
        if on_device is None
        else Compared(name="memory", predicted=on_device, measured=max(each.peak_memory_bytes for each in steps)),
        memory_note=_NOT_ON_CPU if on_device is None else "",
        factor=step / timed.time.without_factor,
        last=_last_steps(timed, steps),
    )


def compared_plan(config: TrainConfig, planner: PlannerConfig, folder: Path) -> tuple[JobPlan, Comparison]:
    """Plans a run with the schedule and the cut that it follows, and compares.

    Args:
        planner: rates and the declared factor.

    Raises:
        ConfigError: the run has measured nothing yet, a file is not what a run writes, or the rates do not apply.
    """
    run = followed_run(folder)
    config, schedule = followed_config(config, run)
    plan = plan_job(config, planner, schedule)
    device = run.measured.device
    return plan, compare(plan.config, require_time(plan), plan.memory, folder, device)


def compared_run(config: TrainConfig, folder: Path) -> Comparison:
    """Predicts a run from its own measurements, and compares.

    Raises:
        ConfigError: the run has measured nothing yet, or a file is not what a run writes.
    """
    rates, run = run_rates(folder), followed_run(folder)
    config, schedule = followed_config(config, run)
    timed = time_plan(rates, EfficiencyConfig(unexplained=1.0), config, schedule=schedule)
    device = run.measured.device
    return compare(config, timed, None if device == "cpu" else predict_memory(config), folder, device)


def _parts(config: TrainConfig, timed: TimedPlan, steps: Sequence[RecordedStep]) -> tuple[Compared, ...]:
    """Returns the parts of a step, means over ranks as in a run's record."""
    simulation, num_ranks = timed.simulation, timed.schedule.num_ranks
    predicted = {
        "bubble": sum(simulation.idle) / num_ranks,
        "exposed_exchange": sum(simulation.exposed) / num_ranks,
        "outside": timed.time.optimizer,
    }
    if config.schedule.pairing == "sequential":
        # The plan counts exchange that nothing hides as computation.
        del predicted["exposed_exchange"]
    return tuple(
        Compared(name=name, predicted=seconds, measured=median_of(steps, name)) for name, seconds in predicted.items()
    )


def _last_steps(timed: TimedPlan, steps: Sequence[RecordedStep]) -> LastSteps | None:
    before, last = steps[:-_LAST], steps[-_LAST:]
    if len(before) < _LAST // 2:
        return None
    return LastSteps(count=len(last), predicted=median_of(before, "step"), measured=median_of(last, "step"))
