"""Products of rows sorted by group with one matrix per group, in plain PyTorch.

Shape legend: A rows (all groups together), E groups, K and N inner and outer width. `counts` lives on the host.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.grouped_gemm.shapes import check_rows, check_weight


def grouped_rows(rows_AK: Tensor, weight_ENK: Tensor, counts: Sequence[int]) -> Tensor:
    """rows_AN: each group's rows times the transpose of its matrix. Groups may be empty.

    Raises:
        ValueError: operands that do not fit each other, or counts that do not add up to A.
    """
    check_rows("grouped_rows", rows_AK, weight_ENK, counts)
    out_AN = rows_AK.new_empty(rows_AK.shape[0], weight_ENK.shape[1])
    first = 0
    for group, count in enumerate(counts):
        if count:
            torch.mm(rows_AK[first : first + count], weight_ENK[group].t(), out=out_AN[first : first + count])
        first += count
    return out_AN


def grouped_weight(grad_AN: Tensor, rows_AK: Tensor, counts: Sequence[int]) -> Tensor:
    """weight gradient ENK of `grouped_rows`: per group, the transpose of its output gradient times its rows.

    Raises:
        ValueError: operands that do not fit each other, or counts that do not add up to A.
    """
    check_weight("grouped_weight", grad_AN, rows_AK, counts)
    out_ENK = grad_AN.new_zeros(len(counts), grad_AN.shape[1], rows_AK.shape[1])
    first = 0
    for group, count in enumerate(counts):
        if count:
            rows = slice(first, first + count)
            torch.mm(grad_AN[rows].t(), rows_AK[rows], out=out_ENK[group])
        first += count
    return out_ENK
