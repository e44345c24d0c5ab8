"""Grouped products in FP8 with the fastest tiling, measured at the first product of a shape.

Row counts are rounded up to the next power of two, for any distribution over the groups. Results whose columns are not
a multiple of 16 keep the default tiling: unaligned stores take registers that other tilings do not have.
"""

from collections.abc import Hashable, Sequence

import torch

from kernels.gemm_fp8.tuned import TunedProduct, round_up
from kernels.grouped_gemm import triton_fp8
from kernels.grouped_gemm.triton import is_stored_at_once
from kernels.launch import Tiling
from kernels.quantize.layout import Quantized, QuantizedBlocks, QuantizedColumns


def rows_key(rows: Quantized, weights: QuantizedBlocks, counts: Sequence[int], dtype: torch.dtype) -> Hashable | None:
    """Returns sizes and type of `grouped_rows_fp8`."""
    _, num_outputs, depth = weights.codes.shape
    return _key(len(counts), round_up(len(rows.codes)), depth, num_outputs, dtype)


def weight_key(grad: QuantizedColumns, rows: QuantizedColumns, counts: Sequence[int]) -> Hashable | None:
    """Returns the sizes of `grouped_weight_fp8`."""
    return _key(len(counts), round_up(sum(counts)), len(grad.codes), len(rows.codes), torch.float32)


def _key(num_groups: int, num_rows: int, depth: int, num_columns: int, dtype: torch.dtype) -> Hashable | None:
    sizes = (num_groups, num_rows, depth, num_columns)
    return (dtype, *sizes) if all(sizes) and is_stored_at_once(num_columns) else None


GROUPED_CANDIDATES = (
    triton_fp8.OF_ROWS,
    Tiling(specialize=True, warps=4),
    Tiling(rows=64, warps=4, stages=3, programs_per_sm=2),
    Tiling(rows=64, warps=4, stages=3, programs_per_sm=3),
)
WEIGHT_CANDIDATES = (
    triton_fp8.WEIGHT_TILING,
    Tiling(specialize=True, warps=4, stages=3),
    Tiling(outputs=64, warps=8, stages=3, programs_per_sm=2),
    Tiling(rows=64, warps=4, stages=3, programs_per_sm=2),
)
grouped_rows_fp8 = TunedProduct(triton_fp8.grouped_rows_fp8, rows_key, GROUPED_CANDIDATES)
grouped_weight_fp8 = TunedProduct(triton_fp8.grouped_weight_fp8, weight_key, WEIGHT_CANDIDATES)
