"""FP8 codes with a scale per 1 x 128, 128 x 1 or 128 x 128, and rows in 12 bits per number."""

# Shape legend: E matrices, N rows, D columns, T tiles in a row, M blocks in a column, R rows processed at a time (128
# of a block), C columns of a tile (128), P rows after every group is padded to whole tiles; values of any leading
# dimensions have no suffix. E5M6: B bytes of a packed row, V numbers of a row (D, or D + 1 if D is odd).

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kernels.quantize.layout import (
    E5M6_MIN_AMAX,
    LARGEST_CODE,
    TILE,
    PackedE5M6,
    Quantized,
    QuantizedBlocks,
    QuantizedColumns,
    check_counts,
    check_min_amax,
    check_numbers,
    check_packed,
    check_quantized,
    check_quantized_blocks,
    check_scales,
    empty_quantized,
    num_pairs,
    num_tiles,
    padded_rows,
)

CHUNK_NUMBERS = 2**18  # 1 MB of float32: intermediate values stay in the cache


def quantize_1x128(rows_ND: Tensor, *, power_of_two: bool, min_amax: float = 1e-4) -> Quantized:
    """Quantizes rows tile by tile (arXiv:2412.19437, section 3.3.2).

    A tile's scale is `max(amax, min_amax) / 448`, in float32; codes are `value / scale`, rounded to nearest even and
    saturated at 448. A tile with a NaN or an infinity becomes all NaN, scale and codes. The last tile may be ragged.

    Args:
        power_of_two: whether to round the scale up to a power of two, so that quantizing again is exact.
        min_amax: lower bound of a tile's amax, in [2**-117, 2**127], so that a scale is a normal number.
    """
    check_min_amax(min_amax)
    check_numbers("quantize_1x128: rows_ND", rows_ND, 2)
    return _quantize_tiles(rows_ND, power_of_two=power_of_two, min_amax=min_amax)


def _quantize_tiles(rows_ND: Tensor, *, power_of_two: bool, min_amax: float) -> Quantized:
    num_rows, num_columns = rows_ND.shape
    quantized = empty_quantized(rows_ND, num_rows, num_columns)
    chunk_rows = max(1, CHUNK_NUMBERS // max(1, num_columns))
    for first in range(0, num_rows if num_columns else 0, chunk_rows):
        chunk = slice(first, first + chunk_rows)
        # Tiles of a chunk of rows, R T C, and the largest magnitude of each, R T.
        values_RTC = split_into_tiles(rows_ND[chunk].float())
        amax_RT = values_RTC.abs().amax(dim=2)
        scales_RT = compute_scales(amax_RT, power_of_two=power_of_two, min_amax=min_amax)
        scaled_RTC = values_RTC.div(scales_RT[:, :, None]).clamp_(-LARGEST_CODE, LARGEST_CODE)
        finite_RT = scales_RT.isfinite()
        if not finite_RT.all():
            scaled_RTC.masked_fill_(~finite_RT[:, :, None], torch.nan)  # one NaN code for both signs
        # Storing codes rounds to e4m3; the padding of the last tile is cut off, R D.
        quantized.scales[chunk] = scales_RT
        quantized.codes[chunk] = scaled_RTC.flatten(1)[:, :num_columns]
    return quantized


def decode(codes: Tensor) -> Tensor:
    """Returns the float32 values of FP8 codes by a table: torch's cast takes five times as long on a CPU."""
    table = torch.arange(256, dtype=torch.uint8, device=codes.device).view(torch.float8_e4m3fn).float()
    return table.index_select(0, codes.view(torch.uint8).flatten().int()).view(codes.shape)


def dequantize_1x128(quantized: Quantized, dtype: torch.dtype) -> Tensor:
    """Restores rows ND: code times scale in float32 (float64 if that is the dtype), rounded to `dtype`."""
    check_quantized("dequantize_1x128", *quantized)
    num_rows, num_columns = quantized.codes.shape
    rows_ND = quantized.codes.new_empty(num_rows, num_columns, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    chunk_rows = max(1, CHUNK_NUMBERS // max(1, num_columns))
    for first in range(0, num_rows if num_columns else 0, chunk_rows):
        chunk = slice(first, first + chunk_rows)
        # The product is exact in float32 up to one rounding, and is rounded to `dtype` when it is stored.
        scales_RT = quantized.scales[chunk].to(wide)
        codes_RTC = split_into_tiles(decode(quantized.codes[chunk]).to(wide))
        rows_ND[chunk] = (codes_RTC * scales_RT[:, :, None]).flatten(1)[:, :num_columns]
    return rows_ND


def compute_scales(amax_RT: Tensor, *, power_of_two: bool, min_amax: float) -> Tensor:
    """Computes scales from the largest magnitudes of tiles; NaN if a magnitude is not finite."""
    scales_RT = amax_RT.clamp(min=min_amax) / LARGEST_CODE
    if power_of_two:
        # Adding the mantissa's mask carries into the exponent unless the number is a power of two already.
        scales_RT = ((scales_RT.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    return scales_RT.where(amax_RT.isfinite(), torch.nan)


def split_into_tiles(rows_RD: Tensor) -> Tensor:
    """Returns rows_RTC: rows split into tiles, the last one padded with zeros."""
    missing = -rows_RD.shape[1] % TILE
    padded_RD = functional.pad(rows_RD, (0, missing)) if missing else rows_RD
    return padded_RD.reshape(rows_RD.shape[0], -1, TILE)


def quantize_128x128(values: Tensor, *, power_of_two: bool, min_amax: float = 1e-4) -> QuantizedBlocks:
    """Quantizes weights [..., N, D] by blocks, the last ones ragged, under the rule of `quantize_1x128`."""
    check_min_amax(min_amax)
    check_numbers("quantize_128x128: values", values)
    *leading, num_rows, num_columns = values.shape
    scales = values.new_empty(*leading, num_tiles(num_rows), num_tiles(num_columns), dtype=torch.float32)
    if values.numel():
        for values_ND, scales_MT in zip(_matrices(values), _matrices(scales), strict=True):
            # 128 rows at a time: a block's amax is that of R rows and C columns of a tile.
            for rows_RD, scales_T in zip(values_ND.split(TILE), scales_MT, strict=True):
                amax_T = split_into_tiles(rows_RD.float()).abs().amax(dim=(0, 2))
                scales_T.copy_(compute_scales(amax_T, power_of_two=power_of_two, min_amax=min_amax))
    return QuantizedBlocks(codes_128x128(values, scales), scales)


def codes_128x128(values: Tensor, scales: Tensor) -> Tensor:
    """Quantizes weights under given scales, saturated at 448; NaN if a block's scale is not finite."""
    check_numbers("codes_128x128: values", values)
    *leading, num_rows, num_columns = values.shape
    shape = (*leading, num_tiles(num_rows), num_tiles(num_columns))
    check_scales("codes_128x128: scales", scales, shape, values.device)
    codes = torch.empty_like(values, dtype=torch.float8_e4m3fn, memory_format=torch.contiguous_format)
    if values.numel():
        for values_ND, scales_MT, codes_ND in zip(_matrices(values), _matrices(scales), _matrices(codes), strict=True):
            for block, rows_RD in enumerate(values_ND.split(TILE)):
                scales_T1 = scales_MT[block, :, None]
                # Each block divides by its own scale; NaN scales mark blocks with a NaN or an infinity.
                scaled_RTC = split_into_tiles(rows_RD.float()).div(scales_T1).clamp_(-LARGEST_CODE, LARGEST_CODE)
                scaled_RTC.masked_fill_(~scales_T1.isfinite(), torch.nan)
                codes_ND[block * TILE : (block + 1) * TILE] = scaled_RTC.flatten(1)[:, :num_columns]
    return codes


def dequantize_128x128(quantized: QuantizedBlocks, dtype: torch.dtype) -> Tensor:
    """Restores weights: code times scale in float32, as the released code does, rounded to `dtype`."""
    check_quantized_blocks("dequantize_128x128", *quantized)
    codes, scales = quantized
    num_columns = codes.shape[-1]
    values = torch.empty_like(codes, dtype=dtype, memory_format=torch.contiguous_format)
    if codes.numel():
        for codes_ND, scales_MT, values_ND in zip(_matrices(codes), _matrices(scales), _matrices(values), strict=True):
            for block, codes_RD in enumerate(codes_ND.split(TILE)):
                product_RTC = split_into_tiles(decode(codes_RD)) * scales_MT[block, :, None]
                values_ND[block * TILE : (block + 1) * TILE] = product_RTC.flatten(1)[:, :num_columns]
    return values


def transpose_blocks(quantized: QuantizedBlocks) -> QuantizedBlocks:
    """Swaps the last two dimensions of quantized weights, exactly: a transposed block keeps its scale."""
    check_quantized_blocks("transpose_blocks", *quantized)
    codes = quantized.codes.view(torch.uint8).mT.contiguous().view(torch.float8_e4m3fn)
    return QuantizedBlocks(codes, quantized.scales.mT.contiguous())


def _matrices(stacked: Tensor) -> Tensor:
    return stacked.reshape(-1, *stacked.shape[-2:])


NAN_HALF = 0x7E00


def pack_e5m6(rows_ND: Tensor) -> PackedE5M6:
    """Packs rows into 12 bits per number, tile by tile (arXiv:2412.19437, section 3.3.3).

    A tile's scale is the smallest power of two, at least 2**-126, for which no magnitude exceeds 65024, the largest
    E5M6 number. A code is the number nearest to `value / scale`, ties to even. A tile with a NaN or an infinity becomes
    all NaN, scale and codes. The last tile may be ragged.
    """
    check_numbers("pack_e5m6: rows_ND", rows_ND, 2)
    num_rows, num_columns = rows_ND.shape
    pairs = num_pairs(num_columns)
    codes_NB = rows_ND.new_empty(num_rows, 3 * pairs, dtype=torch.uint8)
    scales_NT = rows_ND.new_empty(num_rows, num_tiles(num_columns), dtype=torch.float32)
    chunk_rows = max(1, CHUNK_NUMBERS // max(1, num_columns))
    for first in range(0, num_rows if num_columns else 0, chunk_rows):
        chunk = slice(first, first + chunk_rows)
        # Scales, R T 1, are powers of two, so dividing by them is exact.
        values_RTC = split_into_tiles(rows_ND[chunk].float())
        scales_RT1 = _scales(values_RTC.abs().amax(dim=2, keepdim=True))
        halves_RTC = _rounded(values_RTC / scales_RT1).half().view(torch.int16)
        finite_RT1 = scales_RT1.isfinite()
        if not finite_RT1.all():
            halves_RTC.masked_fill_(~finite_RT1, NAN_HALF)
        # Half precision without its last 4 bits: 8 lower bits, and 4 upper bits of which two share a byte.
        halves_RD = halves_RTC.flatten(1)[:, :num_columns]
        halves_RV = functional.pad(halves_RD, (0, 2 * pairs - num_columns))
        upper_RV = halves_RV >> 12 & 0xF
        codes_NB[chunk, : 2 * pairs] = halves_RV >> 4
        codes_NB[chunk, 2 * pairs :] = upper_RV[:, ::2] | upper_RV[:, 1::2] << 4
        scales_NT[chunk] = scales_RT1[:, :, 0]
    return PackedE5M6(codes_NB, scales_NT)


def unpack_e5m6(packed: PackedE5M6, num_columns: int, dtype: torch.dtype) -> Tensor:
    """Restores rows ND: code times scale in float32 (float64 if that is the dtype), rounded to `dtype`."""
    check_packed(packed, num_columns)
    codes_NB, scales_NT = packed
    num_rows = codes_NB.shape[0]
    rows_ND = codes_NB.new_empty(num_rows, num_columns, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    num_lower = 2 * num_pairs(num_columns)
    chunk_rows = max(1, CHUNK_NUMBERS // max(1, num_columns))
    for first in range(0, num_rows if num_columns else 0, chunk_rows):
        chunk = slice(first, first + chunk_rows)
        # The lower 8 bits of all numbers come first, then the upper 4, two numbers to a byte.
        lower_RV = codes_NB[chunk, :num_lower].short()
        pairs_RV = codes_NB[chunk, num_lower:].short()
        upper_RV = torch.stack([pairs_RV & 0xF, pairs_RV >> 4], dim=2).flatten(1)
        # The shift moves the sign to bit 15, which gives IEEE half precision.
        halves_RV = (upper_RV << 12 | lower_RV << 4).view(torch.float16)
        values_RTC = split_into_tiles(halves_RV[:, :num_columns].to(wide))
        product_RTC = values_RTC * scales_NT[chunk].to(wide)[:, :, None]
        rows_ND[chunk] = product_RTC.flatten(1)[:, :num_columns]
    return rows_ND


def _scales(amax: Tensor) -> Tensor:
    bits = amax.clamp(min=E5M6_MIN_AMAX).view(torch.int32)
    # 65024 is 2**15 times a mantissa of 0x7E0000: above that mantissa, the sum carries into the exponent.
    scales = ((bits + 0x1FFFF) & 0x7F800000) - (15 << 23)
    return scales.view(torch.float32).where(amax.isfinite(), torch.nan)


def _rounded(scaled: Tensor) -> Tensor:
    """Rounds numbers of magnitude up to 65024 to 6 bits of mantissa and an exponent of at least -14."""
    # The last bit of a float near 1.5 * 2**17 times the value's power of two, or times 2**-14, is the last bit to keep.
    large = scaled.view(torch.int32).bitwise_and(0x7F800000).clamp_(min=127 - 14 << 23).add_((17 << 23) + (1 << 22))
    large = large.view(torch.float32)
    return (scaled + large).sub_(large).copysign_(scaled)


CHUNK_TILES = 2


def quantize_columns(
    rows_ND: Tensor, counts: Sequence[int], *, power_of_two: bool, min_amax: float = 1e-4
) -> QuantizedColumns:
    """Quantizes the transpose by tiles of 128 rows of a group, as `quantize_1x128` with padded groups."""
    check_numbers("quantize_columns: rows_ND", rows_ND, 2)
    check_counts("quantize_columns", counts, rows_ND.shape[0])
    check_min_amax(min_amax)
    quantized = _quantize_tiles(_pad_groups(rows_ND, counts).t(), power_of_two=power_of_two, min_amax=min_amax)
    return QuantizedColumns(quantized.codes, quantized.scales)


def quantize_both(
    rows_ND: Tensor, counts: Sequence[int], *, power_of_two: bool, min_amax: float = 1e-4
) -> tuple[Quantized, QuantizedColumns]:
    """Returns `quantize_1x128` and `quantize_columns` of the same rows, which a kernel reads once."""
    options: dict[str, Any] = {"power_of_two": power_of_two, "min_amax": min_amax}
    return quantize_1x128(rows_ND, **options), quantize_columns(rows_ND, counts, **options)


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
        # A few columns of all rows at a time: whole rows in float32 would take four times the codes' memory.
        rows_NC = dequantize_1x128(Quantized(codes_ND[:, chunk], scales_NT[:, tiles]), torch.float32)
        quantized_chunk = quantize_columns(rows_NC, counts, power_of_two=power_of_two, min_amax=min_amax)
        codes_DP[chunk], scales_DT[chunk] = quantized_chunk
    return QuantizedColumns(codes_DP, scales_DT)


def _pad_groups(rows_ND: Tensor, counts: Sequence[int]) -> Tensor:
    if all(count % TILE == 0 for count in counts):
        return rows_ND
    rows_PD = rows_ND.new_zeros(padded_rows(counts), rows_ND.shape[1])
    # Every group begins at a multiple of 128 rows, so that no tile spans two groups.
    first = 0
    for rows_GD in rows_ND.split(list(counts)):
        rows_PD[first : first + len(rows_GD)] = rows_GD
        first += padded_rows([len(rows_GD)])
    return rows_PD
