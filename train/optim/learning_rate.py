"""The learning rate as a pure function of the step: of no layout, and not of where a run was resumed. No torch here.

A kind of schedule is a frozen dataclass and a function that register in `LR_SCHEDULES`. This project's kinds are in
`train.optim.rates`. A file outside the checkout can register one more (docs/extend.md).
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
    """A schedule that no run can follow. The text starts with the dotted key that it is about."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RateSchedule:
    """What every kind of schedule has: its name, and a linear warm-up, during which its function is not called."""

    kind: str
    warmup: Duration


@dataclass(frozen=True, slots=True)
class ScheduleContext:
    """What a schedule is followed over.

    Attributes:
        peak: the learning rate that the schedule scales.
        sizes: sequences of every step of the run.
        num_steps: of the run.
        warmup: tokens of the warm-up.
    """

    peak: float
    sizes: BatchSizes
    num_steps: int
    warmup: float

    @property
    def total(self) -> int:
        """Tokens of the run."""
        return self.sizes.tokens_before(self.num_steps)

    def tokens(self, duration: Duration) -> float:
        """Returns the tokens that a duration from the start of the run holds."""
        return duration.tokens(self.sizes, self.num_steps)

    def progress(self, now: float, start: float, end: float) -> float:
        """Returns how far `now` is from `start`, or the end of the warm-up if that is later, to `end`: from 0 to 1."""
        start = max(self.warmup, start)
        if now >= end:
            return 1.0
        return (now - start) / (end - start) if now > start else 0.0

    def require_order(self, first: str, earlier: Duration, second: str, later: Duration) -> None:
        """Refuses a duration that ends after another.

        Args:
            first: name of the field that holds `earlier`.
            earlier: must not end after `later`.
            second: name of the field that holds `later`.
            later: see `earlier`.

        Raises:
            RateError: it does.
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
        rate: returns the rate after the warm-up, from the schedule, the context and the tokens of all steps before.
        check: raises `RateError` if the run cannot follow the schedule.
        warnings: returns a line for each part of the schedule that does not suit the run's length.
    """

    summary: str
    config: type[RateSchedule]
    rate: Callable[[Any, ScheduleContext, int], float]
    check: Callable[[Any, ScheduleContext], None] = _require_nothing
    warnings: Callable[[Any, ScheduleContext], tuple[str, ...]] = _warn_of_nothing


LR_SCHEDULES = Registry[RateSpec](f"{PLACE}.kind", ("train.optim.rates",))


def learning_rate(config: "OptimConfig", sizes: BatchSizes, num_steps: int, step: int) -> float:
    """Returns the rate of the update that ends a step.

    Every duration is measured in tokens, so a growing batch does not stretch it. With batches of one size that is the
    same as measuring in steps.

    Args:
        config: of the optimizer.
        sizes: sequences of every step of the run.
        num_steps: of the run.
        step: from 0.
    """
    context = _context(config, sizes, num_steps)
    after = sizes.tokens_before(step + 1)
    if after < context.warmup:
        return context.peak * (after / context.warmup)
    return LR_SCHEDULES.get(config.schedule.kind).rate(config.schedule, context, sizes.tokens_before(step))


def check_schedule(config: "OptimConfig", sizes: BatchSizes, num_steps: int) -> None:
    """Refuses a schedule that the run cannot follow; arguments as of `learning_rate`.

    Raises:
        RateError: names the key, the rule, the value and the nearest valid one.
    """
    LR_SCHEDULES.get(config.schedule.kind).check(config.schedule, _context(config, sizes, num_steps))


def schedule_warnings(config: "OptimConfig", sizes: BatchSizes, num_steps: int) -> tuple[str, ...]:
    """Returns a line for each part of the schedule that does not suit the run's length.

    Args:
        config: of the optimizer.
        sizes: sequences of every step of the run.
        num_steps: of the run.
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
