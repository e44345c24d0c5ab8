"""FP8 codes with one scale per row and 128 columns, or per block of 128 x 128, in plain PyTorch.

Shape legend: N rows, D columns, T tiles in a row, R rows worked on at a time, C columns of a tile (128), M blocks in a
column.
"""

import torch
from torch import Tensor
from torch.nn import functional

from kernels.quantize.layout import LARGEST_CODE, TILE, Quantized, QuantizedBlocks, check_min_amax, num_tiles

CHUNK_NUMBERS = 2**18  # a megabyte of float32: intermediate values stay in the cache


def quantize_1x128(rows_ND: Tensor, power_of_two: bool, min_amax: float = 1e-4) -> Quantized:
    """Codes and scales of rows, tile by tile (arXiv:2412.19437, section 3.3.2).

    A tile's scale is `max(amax, min_amax) / 448`, in float32; codes are `value / scale`, rounded to nearest even and
    saturated at 448. A tile with a NaN or an infinity becomes all NaN, scale and codes. The last tile may be ragged.

    Args:
        rows_ND: floating point, read as float32; its rows may lie apart in memory.
        power_of_two: round the scale up to a power of two, so that quantising again loses nothing.
        min_amax: lower bound of a tile's amax; in [2**-117, 2**127], so that a scale is a normal number.

    Raises:
        ValueError: min_amax out of bounds.
    """
    check_min_amax(min_amax)
    num_rows, num_columns = rows_ND.shape
    codes_ND = rows_ND.new_empty(num_rows, num_columns, dtype=torch.float8_e4m3fn)
    scales_NT = rows_ND.new_empty(num_rows, num_tiles(num_columns), dtype=torch.float32)
    chunk_rows = max(1, CHUNK_NUMBERS // max(1, num_columns))
    for first in range(0, num_rows if num_columns else 0, chunk_rows):
        chunk = slice(first, first + chunk_rows)
        values_RTC = _tiles(rows_ND[chunk].float())
        amax_RT = values_RTC.abs().amax(dim=2)
        scales_RT = _scales(amax_RT, power_of_two, min_amax)
        scaled_RTC = values_RTC.div(scales_RT[:, :, None]).clamp_(-LARGEST_CODE, LARGEST_CODE)
        finite_RT = scales_RT.isfinite()
        if not finite_RT.all():
            scaled_RTC.masked_fill_(~finite_RT[:, :, None], torch.nan)  # one NaN, whatever the sign that came in
        scales_NT[chunk] = scales_RT
        codes_ND[chunk] = scaled_RTC.flatten(1)[:, :num_columns]
    return Quantized(codes_ND, scales_NT)


def dequantize_1x128(quantized: Quantized, dtype: torch.dtype) -> Tensor:
    """Rows from codes and scales.

    Args:
        quantized: codes float8_e4m3fn [N, D] and scales float32 [N, ceil(D / 128)].
        dtype: of the result.

    Returns:
        rows_ND: code times scale in float32 (float64 where that is the dtype), rounded to `dtype`.
    """
    num_rows, num_columns = quantized.codes.shape
    rows_ND = quantized.codes.new_empty(num_rows, num_columns, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    chunk_rows = max(1, CHUNK_NUMBERS // max(1, num_columns))
    for first in range(0, num_rows if num_columns else 0, chunk_rows):
        chunk = slice(first, first + chunk_rows)
        scales_RT = quantized.scales[chunk].to(wide)
        codes_RTC = _tiles(quantized.codes[chunk].to(wide))
        rows_ND[chunk] = (codes_RTC * scales_RT[:, :, None]).flatten(1)[:, :num_columns]
    return rows_ND


def quantize_128x128(values_ND: Tensor, power_of_two: bool, min_amax: float = 1e-4) -> QuantizedBlocks:
    """Codes and scales of a weight, block by block; scale and code by the rule of `quantize_1x128`.

    Args:
        values_ND: floating point, read as float32. The last blocks may be ragged.
        power_of_two: round the scale up to a power of two.
        min_amax: lower bound of a block's amax; in [2**-117, 2**127].

    Raises:
        ValueError: min_amax out of bounds.
    """
    check_min_amax(min_amax)
    num_rows, num_columns = values_ND.shape
    scales_MT = values_ND.new_empty(num_tiles(num_rows), num_tiles(num_columns), dtype=torch.float32)
    if num_rows and num_columns:
        for block, rows_RD in enumerate(values_ND.split(TILE)):
            amax_T = _tiles(rows_RD.float()).abs().amax(dim=(0, 2))
            scales_MT[block] = _scales(amax_T, power_of_two, min_amax)
    return QuantizedBlocks(codes_128x128(values_ND, scales_MT), scales_MT)


def codes_128x128(values_ND: Tensor, scales_MT: Tensor) -> Tensor:
    """Codes of a weight under given scales: value over scale, to nearest even, saturated at 448.

    Args:
        values_ND: floating point, read as float32.
        scales_MT: float32 [ceil(N / 128), ceil(D / 128)].

    Returns:
        codes_ND: float8_e4m3fn; NaN in a block whose scale is no finite number.
    """
    codes_ND = torch.empty_like(values_ND, dtype=torch.float8_e4m3fn, memory_format=torch.contiguous_format)
    num_columns = values_ND.shape[1]
    for block, rows_RD in enumerate(values_ND.split(TILE) if values_ND.numel() else ()):
        scales_T1 = scales_MT[block, :, None]
        scaled_RTC = _tiles(rows_RD.float()).div(scales_T1).clamp_(-LARGEST_CODE, LARGEST_CODE)
        scaled_RTC.masked_fill_(~scales_T1.isfinite(), torch.nan)
        codes_ND[block * TILE : (block + 1) * TILE] = scaled_RTC.flatten(1)[:, :num_columns]
    return codes_ND


def dequantize_128x128(quantized: QuantizedBlocks, dtype: torch.dtype) -> Tensor:
    """A weight from codes and scales.

    Args:
        quantized: codes float8_e4m3fn [N, D] and scales float32 [ceil(N / 128), ceil(D / 128)].
        dtype: of the result.

    Returns:
        values_ND: code times scale in float32, as the released code does, rounded to `dtype`.
    """
    codes_ND, scales_MT = quantized
    num_columns = codes_ND.shape[1]
    values_ND = torch.empty_like(codes_ND, dtype=dtype, memory_format=torch.contiguous_format)
    for block, codes_RD in enumerate(codes_ND.split(TILE) if codes_ND.numel() else ()):
        product_RTC = _tiles(codes_RD.float()) * scales_MT[block, :, None]
        values_ND[block * TILE : (block + 1) * TILE] = product_RTC.flatten(1)[:, :num_columns]
    return values_ND


def _scales(amax_RT: Tensor, power_of_two: bool, min_amax: float) -> Tensor:
    scales_RT = amax_RT.clamp(min=min_amax) / LARGEST_CODE
    if power_of_two:
        # Adding the mantissa's mask carries into the exponent unless the number is a power of two already.
        scales_RT = ((scales_RT.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    return scales_RT.where(amax_RT.isfinite(), torch.nan)


def _tiles(rows_RD: Tensor) -> Tensor:
    """rows_RTC: rows cut into tiles, the last one filled up with zeros."""
    missing = -rows_RD.shape[1] % TILE
    padded_RD = functional.pad(rows_RD, (0, missing)) if missing else rows_RD
    return padded_RD.reshape(rows_RD.shape[0], -1, TILE)
