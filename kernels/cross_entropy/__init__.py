"""Computes the cross-entropy of a linear head and its gradients.

`implementation`: None for the one that suits the operands' device.
Shape legend: as in kernels/cross_entropy/reference.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernels.implementation import Implementation, is_reference

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.cross_entropy.reference import CrossEntropy


def linear_cross_entropy(
    rows_ND: Tensor,
    head_VD: Tensor,
    targets_N: Tensor,
    *,
    wants_rows: bool,
    wants_head: bool,
    implementation: Implementation | None = None,
) -> CrossEntropy:
    """Computes the loss of a linear head and its gradients, as the function in `kernels.cross_entropy.reference`."""
    if is_reference(implementation, rows_ND.device):
        from kernels.cross_entropy import reference

        return reference.linear_cross_entropy(rows_ND, head_VD, targets_N, wants_rows=wants_rows, wants_head=wants_head)
    from kernels.cross_entropy import triton

    return triton.linear_cross_entropy(rows_ND, head_VD, targets_N, wants_rows=wants_rows, wants_head=wants_head)
