"""Updates float32 weights by AdamW with both moments in bf16.

Imports no torch: computing coefficients needs none.

Shape legend: as in kernels/adamw/reference.py.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from kernels.implementation import Implementation, is_reference

if TYPE_CHECKING:
    from torch import Tensor


class Coefficients(NamedTuple):
    """Coefficients of the update, computed in float64 and rounded once to float32 where they are used."""

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
    """Term added to the corrected root."""
    move: float
    """-learning rate / (1 - beta1^step)."""


def compute_coefficients(
    step: int, *, learning_rate: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> Coefficients:
    """Computes the coefficients of AdamW (arXiv:1711.05101) as torch does.

    Args:
        step: number of this update, from 1.
        learning_rate: learning rate of this update.
        betas: decay rates of the moving averages of gradients and of squared gradients.
        eps: term added to the denominator.
        weight_decay: decay rate, decoupled from the gradient.
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


def adamw_bf16_moments(
    weights: Tensor,
    gradients: Tensor,
    means: Tensor,
    squares: Tensor,
    coefficients: Coefficients,
    *,
    implementation: Implementation | None = None,
) -> None:
    """Takes one step in place, as `kernels.adamw.reference.adamw_bf16_moments` does.

    `implementation`: None selects the default for the weights' device.
    """
    if is_reference(implementation, weights.device):
        from kernels.adamw import reference

        reference.adamw_bf16_moments(weights, gradients, means, squares, coefficients)
    else:
        from kernels.adamw import triton

        triton.adamw_bf16_moments(weights, gradients, means, squares, coefficients)
