"""The learning rate as a pure function of the step: of no layout, and not of where a run was resumed. No torch here."""

import math
from typing import assert_never

from data.batch_sizes import BatchSizes
from train.optim.config import ConstantRate, DecayedRate, OptimConfig, Span, V3Rate, WsdRate


def learning_rate(config: OptimConfig, sizes: BatchSizes, num_steps: int, step: int) -> float:
    """Returns the rate of the update that ends a step.

    Every span is measured in tokens, so a growing batch does not stretch it. With batches of one size that is the same
    as measuring in steps.

    Args:
        config: of the optimizer.
        sizes: sequences of every step of the run.
        num_steps: of the run.
        step: from 0.
    """
    schedule, peak = config.schedule, config.learning_rate
    before, after = sizes.tokens_before(step), sizes.tokens_before(step + 1)
    warmup = span_tokens(schedule.warmup, sizes, num_steps)
    if after < warmup:
        return peak * (after / warmup)
    match schedule:
        case ConstantRate():
            return peak
        case DecayedRate():
            start = max(warmup, span_tokens(schedule.decay_start, sizes, num_steps))
            progress = _progress(before, start, span_tokens(schedule.decay_end, sizes, num_steps))
            share = _cosine(progress) if schedule.kind == "cosine" else 1 - progress
            return peak * (schedule.final_ratio + (1 - schedule.final_ratio) * share)
        case WsdRate():
            start = max(warmup, wsd_decay_start(schedule, sizes, num_steps))
            progress = _progress(before, start, sizes.tokens_before(num_steps))
            share = 1 - (progress if schedule.decay_shape == "linear" else math.sqrt(progress))
            return peak * (schedule.final_ratio + (1 - schedule.final_ratio) * share)
        case V3Rate():
            if before >= span_tokens(schedule.last_start, sizes, num_steps):
                return schedule.last_learning_rate
            start = max(warmup, span_tokens(schedule.decay_start, sizes, num_steps))
            progress = _progress(before, start, span_tokens(schedule.decay_end, sizes, num_steps))
            return schedule.final_learning_rate + (peak - schedule.final_learning_rate) * _cosine(progress)
        case _ as other:
            assert_never(other)


def span_tokens(span: Span, sizes: BatchSizes, num_steps: int) -> float:
    """Returns the tokens that a span from the start of the run holds."""
    match span.unit:
        case "%":
            return sizes.tokens_before(num_steps) * span.amount / 100
        case "steps":
            return sizes.tokens_before(int(span.amount))
        case "tokens":
            return span.amount
        case _ as other:
            assert_never(other)


def wsd_decay_start(schedule: WsdRate, sizes: BatchSizes, num_steps: int) -> float:
    """Returns the tokens before the decay, whose span is counted from the end of the run."""
    if schedule.decay.unit == "steps":
        return sizes.tokens_before(max(num_steps - int(schedule.decay.amount), 0))
    return max(sizes.tokens_before(num_steps) - span_tokens(schedule.decay, sizes, num_steps), 0)


def schedule_warnings(config: OptimConfig, sizes: BatchSizes, num_steps: int) -> tuple[str, ...]:
    """Returns a line for each part of the schedule that does not suit the run's length.

    Args:
        config: of the optimizer.
        sizes: sequences of every step of the run.
        num_steps: of the run.
    """
    schedule, total = config.schedule, sizes.tokens_before(num_steps)
    place, lines = "optim.schedule", []
    warmup = span_tokens(schedule.warmup, sizes, num_steps)
    if warmup > total:
        lines.append(
            f"{place}.warmup: is longer than the run, so the learning rate never reaches its peak: is "
            f"{schedule.warmup.to_plain()}, the run has {num_steps:,} steps; nearest: {place}.warmup='5 %'"
        )
    if isinstance(schedule, DecayedRate | V3Rate):
        end = span_tokens(schedule.decay_end, sizes, num_steps)
        if 2 * end < total:
            lines.append(
                f"{place}.decay_end: ends before half of the run, the rest trains at the lowest rate: is "
                f"{schedule.decay_end.to_plain()}, {100 * end / total:.2g} % of {num_steps:,} steps; "
                f"nearest: {place}.decay_end='100 %'"
            )
    return tuple(lines)


def _progress(now: float, start: float, end: float) -> float:
    """Returns how far `now` is from `start` to `end`, between 0 and 1."""
    if now >= end:
        return 1.0
    return (now - start) / (end - start) if now > start else 0.0


def _cosine(progress: float) -> float:
    """Returns half a cosine's fall from 1 to 0."""
    return (1 + math.cos(math.pi * progress)) / 2
