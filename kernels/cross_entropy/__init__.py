"""Computes log-probabilities of targets under a linear head, and gradients of losses.

`implementation`: None selects the default for the operands' device.
Shape legend: as in kernels/cross_entropy/reference.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernels.implementation import Implementation, is_reference

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cross_entropy.reference import RowScores, RowSlopes


def linear_cross_entropy(
    rows_ND: Tensor,
    head_VD: Tensor,
    targets_N: Tensor,
    row_slopes: RowSlopes | None = None,
    *,
    wants_rows: bool,
    wants_head: bool,
    kept_ids_NK: Tensor | None = None,
    implementation: Implementation | None = None,
) -> RowScores:
    """Computes log-probabilities and gradients, as the function in `kernels.cross_entropy.reference` does."""
    if is_reference(implementation, rows_ND.device):
        from kernels.cross_entropy.reference import linear_cross_entropy as run
    else:
        from kernels.cross_entropy.triton import linear_cross_entropy as run
    return run(
        *(rows_ND, head_VD, targets_N, row_slopes),
        wants_rows=wants_rows,
        wants_head=wants_head,
        kept_ids_NK=kept_ids_NK,
    )
