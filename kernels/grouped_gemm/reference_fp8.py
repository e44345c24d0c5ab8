"""Products of FP8 rows, sorted by group, with one matrix per group, in plain PyTorch."""

# Shape legend: A rows (all groups together), P rows after every group is padded to whole tiles, E groups, K and N inner
# and outer width. `counts` is on the host.

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.gemm_fp8.reference import gemm_fp8, gemm_fp8_columns
from kernels.grouped_gemm.reference import check_rows_fp8, check_weight_fp8
from kernels.quantize.layout import TILE, Quantized, QuantizedBlocks, QuantizedColumns, padded_rows


def grouped_rows_fp8(rows: Quantized, weights: QuantizedBlocks, counts: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Computes `gemm_fp8` of each group's rows with its matrix: [A, N] (arXiv:2412.19437, section 3.3.2).

    `rows` have scales by 1 x 128, `weights` by 128 x 128; results are rounded once, to `dtype`. Counts may be 0.
    """
    num_rows, _, num_outputs, _ = check_rows_fp8("grouped_rows_fp8", rows, weights, counts)
    out_AN = rows.scales.new_empty(num_rows, num_outputs, dtype=dtype)
    first = 0
    for group, count in enumerate(counts):
        part = slice(first, first + count)
        if count:
            matrix = QuantizedBlocks(weights.codes[group], weights.scales[group])
            out_AN[part] = gemm_fp8(Quantized(rows.codes[part], rows.scales[part]), matrix, dtype)
        first += count
    return out_AN


def grouped_weight_fp8(grad: QuantizedColumns, rows: QuantizedColumns, counts: Sequence[int]) -> Tensor:
    """Computes `gemm_fp8_columns` of each group: the gradient of its matrix (arXiv:2412.19437, 3.3.2).

    Both have scales by 128 of P. Returns float32 [E, N, K]; zeros for a group without rows.
    """
    _, num_groups, num_outputs, num_inputs = check_weight_fp8("grouped_weight_fp8", grad, rows, counts)
    out_ENK = grad.scales.new_zeros(num_groups, num_outputs, num_inputs)
    first = 0
    for group, count in enumerate(counts):
        size = padded_rows([count])
        if count:
            part, tiles = slice(first, first + size), slice(first // TILE, (first + size) // TILE)
            left, right = (QuantizedColumns(each.codes[:, part], each.scales[:, tiles]) for each in (grad, rows))
            out_ENK[group] = gemm_fp8_columns(left, right)
        first += size
    return out_ENK
