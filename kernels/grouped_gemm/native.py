"""Computes the products of `reference.py` by one call of torch's grouped product, for CUDA and bf16.

Two cases are handled here: torch rejects a weight gradient over no rows (pytorch#192497), and on some GPUs it leaves
the result of an empty group uninitialized (pytorch#172439). Rows and columns must be multiples of 16 bytes long.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional

from kernels.grouped_gemm.reference import check_rows, check_weight
from kernels.operation import runs_as_on_cuda


def grouped_rows(rows_AK: Tensor, weight_ENK: Tensor, counts: Sequence[int]) -> Tensor:
    """Implements `reference.grouped_rows`."""
    num_rows, _, num_outputs, _ = check_rows("grouped_rows", rows_AK, weight_ENK, counts)
    if num_rows == 0:
        return rows_AK.new_empty(0, num_outputs)
    return functional.grouped_mm(rows_AK, weight_ENK.transpose(1, 2), offs=_ends(counts, rows_AK.device))


def grouped_weight(grad_AN: Tensor, rows_AK: Tensor, counts: Sequence[int]) -> Tensor:
    """Implements `reference.grouped_weight`."""
    num_rows, num_groups, num_outputs, num_inputs = check_weight("grouped_weight", grad_AN, rows_AK, counts)
    if num_rows == 0:
        return rows_AK.new_zeros(num_groups, num_outputs, num_inputs)
    out_ENK = functional.grouped_mm(grad_AN.t(), rows_AK, offs=_ends(counts, rows_AK.device))
    for group, count in enumerate(counts):
        if count == 0:
            out_ENK[group].zero_()
    return out_ENK


def supports(device: torch.device, dtype: torch.dtype, *widths: int) -> bool:
    """Whether torch's grouped product supports rows of these widths."""
    return runs_as_on_cuda(device) and dtype == torch.bfloat16 and all(width * 2 % 16 == 0 for width in widths)


def _ends(counts: Sequence[int], device: torch.device) -> Tensor:
    ends = torch.tensor(list(accumulate(counts)), dtype=torch.int32)
    return ends.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else ends
