"""Configures the optimizer, and computes the learning rate of a step. No torch here.

A kind of schedule is a frozen dataclass and a function of the tokens read so far, which register in `LR_SCHEDULES`. A
file outside the checkout can register one more (docs/extend.md).
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from itertools import pairwise
from typing import Annotated, Any, Literal, Self, assert_never

from base.ranges import NonNegativeFloat, PositiveFloat, PositiveInt, Share, ShareBelowOne
from base.registry import Registry
from data.config import BatchSizes

PLACE = "optim.schedule"

DurationUnit = Literal["%", "steps", "tokens"]

_DURATION = re.compile(r"([0-9][0-9_]*(?:\.[0-9]+)?(?:e\+?[0-9]+)?)\s*(%|steps?|tokens?)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Duration:
    """A part of a run: a share of its tokens, or a number of steps or tokens.

    YAML and the command line write it as text, such as `5 %`, `2000 steps` or `10e9 tokens`. `amount` is 0 to 100 for
    `%`, otherwise a whole number.
    """

    amount: float
    unit: DurationUnit

    @classmethod
    def from_plain(cls, value: object) -> Self:
        """Reads a duration from its text or 0; raises ValueError without the key if it is invalid."""
        rule = "must be a share of the run, steps or tokens, such as '5 %', '2000 steps' or '10e9 tokens'"
        if type(value) in (int, float):
            if value == 0:
                return cls(amount=0, unit="%")
            raise ValueError(f"{rule}, is {value!r}; nearest valid: {_with_unit(Decimal(str(value)))}")
        match = _DURATION.fullmatch(value.strip()) if isinstance(value, str) else None
        if match is None:
            raise ValueError(f"{rule}, is {value!r}")
        amount = Decimal(match[1].replace("_", ""))
        unit = match[2].lower()
        if unit == "%":
            if amount > 100:
                raise ValueError(f"must be at most 100 % of the run, is {value!r}; nearest valid: 100 %")
            return cls(amount=float(amount), unit="%")
        if amount != amount.to_integral_value():
            raise ValueError(f"must be a whole number of {unit}, is {value!r}; nearest valid: {round(amount)} {unit}")
        return cls(amount=int(amount), unit="steps" if unit.startswith("step") else "tokens")

    def to_plain(self) -> str:
        """Returns the text that `from_plain` reads."""
        return f"{Decimal(str(self.amount)).normalize():f} {self.unit}"

    def tokens(self, sizes: BatchSizes, num_steps: int) -> float:
        """Returns the number of tokens in this duration, from the start of a run."""
        match self.unit:
            case "%":
                return sizes.tokens_before(num_steps) * self.amount / 100
            case "steps":
                return sizes.tokens_before(int(self.amount))
            case "tokens":
                return self.amount
            case _ as other:
                assert_never(other)


def _with_unit(number: Decimal) -> str:
    """Returns the duration that a number without a unit most likely means."""
    if 0 < number <= 1:
        return f"{(number * 100).normalize():f} %"
    return f"{max(round(number), 0)} steps"


class RateError(ValueError):
    """An invalid learning-rate schedule. The message starts with the dotted key that it is about."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RateSchedule:
    """The fields of every kind of schedule: its name, and a linear warm-up before its function applies."""

    kind: str
    warmup: Duration


@dataclass(frozen=True, slots=True)
class ScheduleContext:
    """The properties of a run on which a schedule depends; `warmup` is in tokens."""

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
        """Returns the progress, 0 to 1, of `now` from `start`, or the end of the warm-up if later, to `end`."""
        start = max(self.warmup, start)
        if now >= end:
            return 1.0
        return (now - start) / (end - start) if now > start else 0.0

    def require_order(self, first: str, earlier: Duration, second: str, later: Duration) -> None:
        """Raises RateError if the field `first` with the value `earlier` ends after `second` with `later`."""
        if self.tokens(earlier) > self.tokens(later):
            raise RateError(
                f"{PLACE}.{first}: must be at most {PLACE}.{second}={later.to_plain()} of {self.num_steps} steps, "
                f"is {earlier.to_plain()}; nearest valid: {later.to_plain()}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class RateSpec:
    """A kind of schedule that `optim.schedule.kind` can name.

    `rate` returns the rate after the warm-up, from the schedule, its context and the tokens of all earlier steps.
    `check` raises `RateError`. `warnings` returns a line for each part that does not fit the run's length.
    """

    summary: str
    config: type[RateSchedule]
    rate: Callable[[Any, ScheduleContext, int], float]
    check: Callable[[Any, ScheduleContext], None] = lambda schedule, context: None
    warnings: Callable[[Any, ScheduleContext], tuple[str, ...]] = lambda schedule, context: ()


LR_SCHEDULES = Registry[RateSpec](f"{PLACE}.kind", (__name__,))


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """The configuration that all optimizers share.

    AdamW updates what an optimizer does not update by a rule for matrices.

    `sharding`: `zero1` shards AdamW's state over ranks with the same parameters (DeepSpeed); `replicated` does not
    (torch). `moments`: `float32` means float64 for float64 weights, which require `replicated`. Norms have no weight
    decay. A run may resume with another type of moments: bf16 rounds float32 moments, and float32 keeps bf16 ones.
    """

    kind: str
    learning_rate: PositiveFloat
    schedule: Annotated[RateSchedule, LR_SCHEDULES]
    beta1: ShareBelowOne
    beta2: ShareBelowOne
    eps: PositiveFloat
    weight_decay: NonNegativeFloat
    clip_norm: PositiveFloat
    sharding: Literal["zero1", "replicated"]
    moments: Literal["float32", "bf16"]
    bucket_elements: PositiveInt

    @property
    def offload(self) -> Literal[False, True, "torch"]:
        """Whether the state is in host memory; only AdamW has a key for it."""
        return False


def learning_rate(config: OptimConfig, sizes: BatchSizes, num_steps: int, step: int) -> float:
    """Returns the learning rate of a step's update.

    Every duration is measured in tokens, so a batch ramp does not stretch it. With one batch size this equals measuring
    in steps.

    `step` is an index from 0; `sizes` has the sequences of every step.
    """
    context = _context(config, sizes, num_steps)
    after = sizes.tokens_before(step + 1)
    if after < context.warmup:
        return context.peak * (after / context.warmup)
    return LR_SCHEDULES.get(config.schedule.kind).rate(config.schedule, context, sizes.tokens_before(step))


def check_schedule(config: OptimConfig, sizes: BatchSizes, num_steps: int) -> None:
    """Raises RateError if the schedule is invalid for the run. The arguments are those of `learning_rate`."""
    LR_SCHEDULES.get(config.schedule.kind).check(config.schedule, _context(config, sizes, num_steps))


def schedule_warnings(config: OptimConfig, sizes: BatchSizes, num_steps: int) -> tuple[str, ...]:
    """Returns a line for each part of the schedule that does not fit the run's length."""
    schedule = config.schedule
    context = _context(config, sizes, num_steps)
    lines = []
    if context.warmup > context.total:
        lines.append(
            f"{PLACE}.warmup: is longer than the run, so the learning rate never reaches its peak: is "
            f"{schedule.warmup.to_plain()}, the run has {num_steps:,} steps; nearest: {PLACE}.warmup='5 %'"
        )
    return (*lines, *LR_SCHEDULES.get(schedule.kind).warnings(schedule, context))


def _context(config: OptimConfig, sizes: BatchSizes, num_steps: int) -> ScheduleContext:
    return ScheduleContext(config.learning_rate, sizes, num_steps, config.schedule.warmup.tokens(sizes, num_steps))


@dataclass(frozen=True, kw_only=True, slots=True)
class ConstantRate(RateSchedule):
    """A linear warm-up, then a constant rate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecayedRate(RateSchedule):
    """A linear warm-up, a constant rate, then a cosine or linear decay to `final_ratio` of the peak.

    The decay starts at `decay_start`, or at the end of the warm-up if that is later, and ends at `decay_end`.
    """

    decay_start: Duration
    decay_end: Duration
    final_ratio: Share


@dataclass(frozen=True, kw_only=True, slots=True)
class WsdRate(RateSchedule):
    """A warmup-stable-decay schedule (arXiv:2404.06395), which decays over the last `decay` of the run.

    `decay_shape` is `linear`, or `one_minus_sqrt`: 1 - sqrt(progress) (arXiv:2405.18392).
    """

    decay: Duration
    decay_shape: Literal["linear", "one_minus_sqrt"]
    final_ratio: Share


@dataclass(frozen=True, kw_only=True, slots=True)
class V3Rate(RateSchedule):
    """The schedule of DeepSeek-V3's pre-training (arXiv:2412.19437, section 4.2).

    The rate is `last_learning_rate` from `last_start` on.
    """

    decay_start: Duration
    decay_end: Duration
    final_learning_rate: NonNegativeFloat
    last_start: Duration
    last_learning_rate: NonNegativeFloat


def _cosine_rate(schedule: DecayedRate, context: ScheduleContext, tokens: int) -> float:
    return context.peak * _down_to(schedule.final_ratio, _cosine(_decay_progress(schedule, context, tokens)))


def _linear_rate(schedule: DecayedRate, context: ScheduleContext, tokens: int) -> float:
    return context.peak * _down_to(schedule.final_ratio, 1 - _decay_progress(schedule, context, tokens))


def _wsd_rate(schedule: WsdRate, context: ScheduleContext, tokens: int) -> float:
    progress = context.progress(tokens, _wsd_decay_start(schedule, context), context.total)
    share = 1 - (progress if schedule.decay_shape == "linear" else math.sqrt(progress))
    return context.peak * _down_to(schedule.final_ratio, share)


def _v3_rate(schedule: V3Rate, context: ScheduleContext, tokens: int) -> float:
    if tokens >= context.tokens(schedule.last_start):
        return schedule.last_learning_rate
    share = _cosine(_decay_progress(schedule, context, tokens))
    return schedule.final_learning_rate + (context.peak - schedule.final_learning_rate) * share


def _wsd_decay_start(schedule: WsdRate, context: ScheduleContext) -> float:
    """Returns the number of tokens before the decay. The decay is counted from the end of the run."""
    if schedule.decay.unit == "steps":
        return context.sizes.tokens_before(max(context.num_steps - int(schedule.decay.amount), 0))
    return max(context.total - context.tokens(schedule.decay), 0)


def _decay_progress(schedule: DecayedRate | V3Rate, context: ScheduleContext, tokens: int) -> float:
    return context.progress(tokens, context.tokens(schedule.decay_start), context.tokens(schedule.decay_end))


def _down_to(final_ratio: float, share: float) -> float:
    """Interpolates between `final_ratio`, for a share of 0, and 1, for a share of 1."""
    return final_ratio + (1 - final_ratio) * share


def _cosine(progress: float) -> float:
    """Returns a half-cosine that falls from 1 to 0."""
    return (1 + math.cos(math.pi * progress)) / 2


def _check_decay(schedule: DecayedRate | V3Rate, context: ScheduleContext) -> None:
    context.require_order("decay_start", schedule.decay_start, "decay_end", schedule.decay_end)
    if context.warmup <= context.total:
        context.require_order("warmup", schedule.warmup, "decay_end", schedule.decay_end)


def _check_v3(schedule: V3Rate, context: ScheduleContext) -> None:
    _check_decay(schedule, context)
    context.require_order("decay_end", schedule.decay_end, "last_start", schedule.last_start)
    rates = (
        ("optim.learning_rate", context.peak),
        (f"{PLACE}.final_learning_rate", schedule.final_learning_rate),
        (f"{PLACE}.last_learning_rate", schedule.last_learning_rate),
    )
    for (above, most), (key, rate) in pairwise(rates):
        if rate > most:
            raise RateError(f"{key}: must be at most {above}={most}, is {rate}; nearest valid: {most}")


def _early_end(schedule: DecayedRate | V3Rate, context: ScheduleContext) -> tuple[str, ...]:
    """Returns a warning if the decay ends before half of the run."""
    end = context.tokens(schedule.decay_end)
    if 2 * end >= context.total:
        return ()
    return (
        f"{PLACE}.decay_end: ends before half of the run, the rest trains at the lowest rate: is "
        f"{schedule.decay_end.to_plain()}, {100 * end / context.total:.2g} % of {context.num_steps:,} steps; "
        f"nearest: {PLACE}.decay_end='100 %'",
    )


_SPECS = {
    "constant": RateSpec(
        summary="linear warm-up, then constant",
        config=ConstantRate,
        rate=lambda schedule, context, tokens: context.peak,
    ),
    "cosine": RateSpec(
        summary="linear warm-up, then half a cosine to final_ratio of the peak",
        config=DecayedRate,
        rate=_cosine_rate,
        check=_check_decay,
        warnings=_early_end,
    ),
    "linear": RateSpec(
        summary="linear warm-up, then a straight line to final_ratio of the peak",
        config=DecayedRate,
        rate=_linear_rate,
        check=_check_decay,
        warnings=_early_end,
    ),
    "wsd": RateSpec(summary="warm-up, stable, decay over the last part of the run", config=WsdRate, rate=_wsd_rate),
    "v3_tokens": RateSpec(
        summary="DeepSeek-V3's: a cosine, then a last, lower rate",
        config=V3Rate,
        rate=_v3_rate,
        check=_check_v3,
        warnings=_early_end,
    ),
}
for _name, _spec in _SPECS.items():
    LR_SCHEDULES.register(_name, _spec)
