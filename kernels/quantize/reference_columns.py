"""FP8 codes with one scale per column and 128 rows of a group, stored transposed, in plain PyTorch."""

# Shape legend: N rows, D columns, P rows after every group is padded to whole tiles, C columns processed at a time.

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.quantize.layout import (
    TILE,
    Quantized,
    QuantizedColumns,
    check_counts,
    check_numbers,
    check_quantized,
    padded_rows,
)
from kernels.quantize.reference import dequantize_1x128, quantize_1x128

CHUNK_TILES = 2


def quantize_columns(
    rows_ND: Tensor, counts: Sequence[int], *, power_of_two: bool, min_amax: float = 1e-4
) -> QuantizedColumns:
    """Quantizes the transpose by tiles of 128 rows of a group, as `quantize_1x128` with padded groups."""
    check_numbers("quantize_columns: rows_ND", rows_ND, 2)
    check_counts("quantize_columns", counts, rows_ND.shape[0])
    quantized = quantize_1x128(_pad_groups(rows_ND, counts).t(), power_of_two=power_of_two, min_amax=min_amax)
    return QuantizedColumns(quantized.codes, quantized.scales)


def requantize_columns(
    quantized: Quantized, counts: Sequence[int], *, power_of_two: bool, min_amax: float = 1e-4
) -> QuantizedColumns:
    """Applies `quantize_columns` to FP8 rows; exact if scales are powers of two and exponents permit."""
    check_quantized("requantize_columns", *quantized)
    codes_ND, scales_NT = quantized
    num_rows, num_columns = codes_ND.shape
    check_counts("requantize_columns", counts, num_rows)
    num_padded = padded_rows(counts)
    codes_DP = codes_ND.new_empty(num_columns, num_padded)
    scales_DT = scales_NT.new_empty(num_columns, num_padded // TILE)
    for first in range(0, max(1, num_columns), CHUNK_TILES * TILE):
        chunk = slice(first, first + CHUNK_TILES * TILE)
        tiles = slice(first // TILE, first // TILE + CHUNK_TILES)
        rows_NC = dequantize_1x128(Quantized(codes_ND[:, chunk], scales_NT[:, tiles]), torch.float32)
        made = quantize_columns(rows_NC, counts, power_of_two=power_of_two, min_amax=min_amax)
        codes_DP[chunk], scales_DT[chunk] = made
    return QuantizedColumns(codes_DP, scales_DT)


def _pad_groups(rows_ND: Tensor, counts: Sequence[int]) -> Tensor:
    if all(count % TILE == 0 for count in counts):
        return rows_ND
    rows_PD = rows_ND.new_zeros(padded_rows(counts), rows_ND.shape[1])
    first = 0
    for rows_GD in rows_ND.split(list(counts)):
        rows_PD[first : first + len(rows_GD)] = rows_GD
        first += padded_rows([len(rows_GD)])
    return rows_PD
