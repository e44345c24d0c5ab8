"""The learning rate as a pure function of the step."""

import math

from train.config import OptimConfig


def learning_rate(config: OptimConfig, step: int) -> float:
    """Rate of the update that ends step `step` (from 0).

    Linear warm-up from 0, constant, cosine to the final rate, constant: the shape of V3's
    pre-training (arXiv:2412.19437, section 4.2), in steps.
    """
    peak, final = config.learning_rate, config.final_learning_rate
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    if step < config.decay_start_step:
        return peak
    if step >= config.decay_end_step:
        return final
    progress = (step - config.decay_start_step) / (config.decay_end_step - config.decay_start_step)
    return final + (peak - final) * (1 + math.cos(math.pi * progress)) / 2
