"""Defines the learning-rate schedules, each as a dataclass and a function of the tokens read so far."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from kernels.ranges import NonNegativeFloat, Share
from train.optim.duration import Duration
from train.optim.learning_rate import LR_SCHEDULES, PLACE, RateError, RateSchedule, RateSpec, ScheduleContext


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


def _constant_rate(schedule: ConstantRate, context: ScheduleContext, tokens: int) -> float:
    return context.peak


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
    """Refuses durations that are in the wrong order."""
    context.require_order("decay_start", schedule.decay_start, "decay_end", schedule.decay_end)
    if context.warmup <= context.total:
        context.require_order("warmup", schedule.warmup, "decay_end", schedule.decay_end)


def _check_v3(schedule: V3Rate, context: ScheduleContext) -> None:
    """Refuses durations that are in the wrong order, and rates that increase."""
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


LR_SCHEDULES.register(
    "constant", RateSpec(summary="linear warm-up, then constant", config=ConstantRate, rate=_constant_rate)
)
LR_SCHEDULES.register(
    "cosine",
    RateSpec(
        summary="linear warm-up, then half a cosine to final_ratio of the peak",
        config=DecayedRate,
        rate=_cosine_rate,
        check=_check_decay,
        warnings=_early_end,
    ),
)
LR_SCHEDULES.register(
    "linear",
    RateSpec(
        summary="linear warm-up, then a straight line to final_ratio of the peak",
        config=DecayedRate,
        rate=_linear_rate,
        check=_check_decay,
        warnings=_early_end,
    ),
)
LR_SCHEDULES.register(
    "wsd",
    RateSpec(summary="warm-up, stable, decay over the last part of the run", config=WsdRate, rate=_wsd_rate),
)
LR_SCHEDULES.register(
    "v3_tokens",
    RateSpec(
        summary="DeepSeek-V3's: a cosine, then a last, lower rate",
        config=V3Rate,
        rate=_v3_rate,
        check=_check_v3,
        warnings=_early_end,
    ),
)
