"""The products of `reference.py` as one call of torch's grouped product, for CUDA and bf16.

Shape legend: as in reference.py. Rows and columns must be multiples of 16 bytes long.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional


def grouped_rows(rows_AK: Tensor, weight_ENK: Tensor, counts: Sequence[int]) -> Tensor:
    """rows_AN: each group's rows times the transpose of its matrix. Groups may be empty."""
    return functional.grouped_mm(rows_AK, weight_ENK.transpose(1, 2), offs=_ends(counts, rows_AK.device))


def grouped_weight(grad_AN: Tensor, rows_AK: Tensor, counts: Sequence[int]) -> Tensor:
    """weight gradient ENK of `grouped_rows`: per group, the transpose of its output gradient times its rows."""
    return functional.grouped_mm(grad_AN.t(), rows_AK, offs=_ends(counts, rows_AK.device))


def serves(device: torch.device, dtype: torch.dtype, *widths: int) -> bool:
    """Whether torch's grouped product takes rows of these widths."""
    return device.type == "cuda" and dtype == torch.bfloat16 and all(width * 2 % 16 == 0 for width in widths)


def _ends(counts: Sequence[int], device: torch.device) -> Tensor:
    """Where each group ends; int32. A host list goes to the device without waiting for it."""
    ends = torch.tensor(list(accumulate(counts)), dtype=torch.int32)
    return ends.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else ends
