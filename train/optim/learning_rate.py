"""Computes the learning rate as a pure function of the step. No torch here.

It depends neither on the layout nor on the step from which a run was resumed. A kind of schedule is a frozen dataclass
and a function that register in `LR_SCHEDULES`. This project's kinds are in `train.optim.rates`. A file outside the
checkout can register one more (docs/extend.md).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data.batch_sizes import BatchSizes
from kernels.registry import Registry
from train.optim.duration import Duration

if TYPE_CHECKING:
    from train.optim.config import OptimConfig

PLACE = "optim.schedule"


class RateError(ValueError):
    """An invalid learning-rate schedule. The message starts with the dotted key that it is about."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RateSchedule:
    """The fields of every kind of schedule: its name, and a linear warm-up before its function applies."""

    kind: str
    warmup: Duration


@dataclass(frozen=True, slots=True)
class ScheduleContext:
    """The properties of a run on which a learning-rate schedule depends.

    Attributes:
        peak: the learning rate that the schedule scales.
        sizes: sequences of every step of the run.
        num_steps: number of steps of the run.
        warmup: tokens of the warm-up.
    """

    peak: float
    sizes: BatchSizes
    num_steps: int
    warmup: float

    @property
    def total(self) -> int:
        """The number of tokens of the run."""
        return self.sizes.tokens_before(self.num_steps)

    def tokens(self, duration: Duration) -> float:
        """Returns the number of tokens in a duration from the start of the run."""
        return duration.tokens(self.sizes, self.num_steps)

    def progress(self, now: float, start: float, end: float) -> float:
        """Returns the progress of `now` from `start` to `end`, between 0 and 1.

        If the warm-up ends after `start`, the progress starts at the end of the warm-up.
        """
        start = max(self.warmup, start)
        if now >= end:
            return 1.0
        return (now - start) / (end - start) if now > start else 0.0

    def require_order(self, first: str, earlier: Duration, second: str, later: Duration) -> None:
        """Refuses two durations that are in the wrong order.

        Args:
            first: name of the field that holds `earlier`.
            earlier: duration that must not end after `later`.
            second: name of the field that holds `later`.
            later: duration that must not end before `earlier`.

        Raises:
            RateError: `earlier` ends after `later`.
        """
        if self.tokens(earlier) > self.tokens(later):
            raise RateError(
                f"{PLACE}.{first}: must be at most {PLACE}.{second}={later.to_plain()} of {self.num_steps} steps, "
                f"is {earlier.to_plain()}; nearest valid: {later.to_plain()}"
            )


def _require_nothing(schedule: Any, context: ScheduleContext) -> None:
    pass


def _warn_of_nothing(schedule: Any, context: ScheduleContext) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True, kw_only=True, slots=True)
class RateSpec:
    """A kind of schedule that `optim.schedule.kind` can name.

    Attributes:
        summary: one line for users.
        config: its dataclass, a subclass of `RateSchedule`.
        rate: returns the rate after the warm-up, from the schedule, its context and the tokens of all earlier steps.
        check: raises `RateError` if the schedule is invalid for the run.
        warnings: returns a line for each part of the schedule that does not fit the run's length.
    """

    summary: str
    config: type[RateSchedule]
    rate: Callable[[Any, ScheduleContext, int], float]
    check: Callable[[Any, ScheduleContext], None] = _require_nothing
    warnings: Callable[[Any, ScheduleContext], tuple[str, ...]] = _warn_of_nothing


LR_SCHEDULES = Registry[RateSpec](f"{PLACE}.kind", ("train.optim.rates",))


def learning_rate(config: "OptimConfig", sizes: BatchSizes, num_steps: int, step: int) -> float:
    """Returns the learning rate of a step's update.

    Every duration is measured in tokens, so a batch ramp does not stretch it. With one batch size this equals measuring
    in steps.

    Args:
        sizes: sequences of every step of the run.
        num_steps: number of steps of the run.
        step: index of the step, from 0.
    """
    context = _context(config, sizes, num_steps)
    after = sizes.tokens_before(step + 1)
    if after < context.warmup:
        return context.peak * (after / context.warmup)
    return LR_SCHEDULES.get(config.schedule.kind).rate(config.schedule, context, sizes.tokens_before(step))


def check_schedule(config: "OptimConfig", sizes: BatchSizes, num_steps: int) -> None:
    """Refuses a schedule that is invalid for the run. The arguments are those of `learning_rate`.

    Raises:
        RateError: the schedule is invalid. The message names the key, the rule, the value and the nearest valid value.
    """
    LR_SCHEDULES.get(config.schedule.kind).check(config.schedule, _context(config, sizes, num_steps))


def schedule_warnings(config: "OptimConfig", sizes: BatchSizes, num_steps: int) -> tuple[str, ...]:
    """Returns a line for each part of the schedule that does not fit the run's length.

    Args:
        sizes: sequences of every step of the run.
        num_steps: number of steps of the run.
    """
    schedule, context, lines = config.schedule, _context(config, sizes, num_steps), []
    if context.warmup > context.total:
        lines.append(
            f"{PLACE}.warmup: is longer than the run, so the learning rate never reaches its peak: is "
            f"{schedule.warmup.to_plain()}, the run has {num_steps:,} steps; nearest: {PLACE}.warmup='5 %'"
        )
    return (*lines, *LR_SCHEDULES.get(schedule.kind).warnings(schedule, context))


def _context(config: "OptimConfig", sizes: BatchSizes, num_steps: int) -> ScheduleContext:
    return ScheduleContext(config.learning_rate, sizes, num_steps, config.schedule.warmup.tokens(sizes, num_steps))
