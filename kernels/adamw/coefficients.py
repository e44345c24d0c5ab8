"""The numbers of one AdamW step, the same for every weight of a group. No torch here."""

import math
from typing import NamedTuple


class Coefficients(NamedTuple):
    """Factors of the update; computed in float64, rounded once to float32 where they are used."""

    keep_weight: float
    """1 - learning rate x weight decay."""
    keep_mean: float
    """beta1."""
    add_gradient: float
    """1 - beta1."""
    keep_square: float
    """beta2."""
    add_square: float
    """1 - beta2."""
    correct_root: float
    """1 / sqrt(1 - beta2^step)."""
    eps: float
    """Added to the corrected root."""
    move: float
    """-learning rate / (1 - beta1^step)."""


def coefficients(
    step: int, *, learning_rate: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> Coefficients:
    """Those of AdamW (arXiv:1711.05101) as torch computes it.

    Args:
        step: number of this update, from 1.
        learning_rate: of this update.
        betas: decay of the mean of gradients and of that of their squares.
        eps: of the denominator.
        weight_decay: decoupled from the gradient.
    """
    beta1, beta2 = betas
    return Coefficients(
        keep_weight=1 - learning_rate * weight_decay,
        keep_mean=beta1,
        add_gradient=1 - beta1,
        keep_square=beta2,
        add_square=1 - beta2,
        correct_root=1 / math.sqrt(1 - beta2**step),
        eps=eps,
        move=-learning_rate / (1 - beta1**step),
    )
