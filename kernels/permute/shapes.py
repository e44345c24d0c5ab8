"""What the operands of `permute` and `unpermute` must agree on, whoever computes them.

Shape legend: as in kernels/permute/reference.py.
"""

import torch
from torch import Tensor

from kernels.operands import check_operand

INDICES = (torch.int32, torch.int64)


def check_permute(rows_ND: Tensor, source_A: Tensor, out_AD: Tensor | None) -> None:
    """Refuses a result that is not of so many rows of that kind, and sources that are no indices.

    Raises:
        ValueError: another shape, device or type.
    """
    _check_index("permute: source_A", source_A, 1)
    if out_AD is not None:
        shape = (source_A.shape[0], rows_ND.shape[1])
        check_operand("permute: out_AD", out_AD, shape, rows_ND.device, rows_ND.dtype)


def check_unpermute(rows_AD: Tensor, places_NK: Tensor) -> None:
    """Refuses rows that cannot be added, and places that are no indices.

    Raises:
        ValueError: another number of dimensions, or another type.
    """
    _check_index("unpermute: places_NK", places_NK, 2)
    if not rows_AD.is_floating_point():
        raise ValueError(f"unpermute: rows_AD must be floating point, got {rows_AD.dtype}")


def _check_index(subject: str, index: Tensor, num_dims: int) -> None:
    if index.dim() != num_dims or index.dtype not in INDICES:
        given = f"{index.dtype} of {index.dim()}"
        raise ValueError(f"{subject} must be int32 or int64 of {num_dims} dimensions, got {given}")
