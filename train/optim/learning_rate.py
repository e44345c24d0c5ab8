"""The learning rate as a pure function of the step and of the tokens before it."""

import math
from typing import assert_never

from train.config import OptimConfig, StepOptimConfig, TokenOptimConfig


def learning_rate(config: OptimConfig, step: int, tokens: int) -> float:
    """Rate of the update that ends step `step` (from 0), before which `tokens` were read.

    Linear warm-up from 0, constant, cosine to the final rate, constant, and by tokens a last constant: the shape of
    V3's pre-training (arXiv:2412.19437, section 4.2).
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    match config:
        case StepOptimConfig():
            return _decayed(config, step, config.decay_start_step, config.decay_end_step)
        case TokenOptimConfig():
            if tokens >= config.last_start_tokens:
                return config.last_learning_rate
            return _decayed(config, tokens, config.decay_start_tokens, config.decay_end_tokens)
        case _ as other:
            assert_never(other)


def _decayed(config: OptimConfig, now: int, start: int, end: int) -> float:
    """By a cosine from `start` to `end`, constant before and after."""
    peak, final = config.learning_rate, config.final_learning_rate
    if now < start:
        return peak
    if now >= end:
        return final
    progress = (now - start) / (end - start)
    return final + (peak - final) * (1 + math.cos(math.pi * progress)) / 2
