"""Computes divergences of a linear head from a teacher, and their gradients.

There is only the reference, on every device: its products are torch's, and the rest is bound by memory.
Shape legend: as in kernels/distillation/reference.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.distillation.divergence import Divergence
    from kernels.distillation.reference import DistillationScores, Teacher


def linear_distillation(
    rows_ND: Tensor,
    head_VD: Tensor,
    targets_N: Tensor,
    teacher: Teacher,
    form: Divergence,
    *,
    mix: tuple[float, float],
    row_weights_N: Tensor | None = None,
    wants_gradients: bool,
) -> DistillationScores:
    """Computes divergences, log-probabilities and gradients; see `kernels.distillation.reference`."""
    from kernels.distillation.reference import linear_distillation as run

    return run(
        rows_ND,
        head_VD,
        targets_N,
        teacher,
        form,
        mix=mix,
        row_weights_N=row_weights_N,
        wants_gradients=wants_gradients,
    )
