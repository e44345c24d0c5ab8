"""Reorders rows by index, and reverses this with a sum per token.

`implementation`: None selects the default for the operands' device. Shape legend: as in kernels/permute/reference.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernels.implementation import Implementation, is_reference

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def permute(
    rows_ND: Tensor,
    source_A: Tensor,
    out_AD: Tensor | None = None,
    *,
    implementation: Implementation | None = None,
) -> Tensor:
    """Gathers rows by index, AD, zeros for a negative index, as `kernels.permute.reference.permute` does."""
    if is_reference(implementation, rows_ND.device):
        from kernels.permute import reference

        return reference.permute(rows_ND, source_A, out_AD)
    from kernels.permute import triton

    return triton.permute(rows_ND, source_A, out_AD)


def unpermute(
    rows_AD: Tensor,
    places_TK: Tensor,
    dtype: torch.dtype | None = None,
    *,
    implementation: Implementation | None = None,
) -> Tensor:
    """Sums each token's rows, ND, as `kernels.permute.reference.unpermute` does."""
    if is_reference(implementation, rows_AD.device):
        from kernels.permute import reference

        return reference.unpermute(rows_AD, places_TK, dtype)
    from kernels.permute import triton

    return triton.unpermute(rows_AD, places_TK, dtype)
