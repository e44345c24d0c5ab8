"""Rows in 12 bits per number with one scale per row and 128 columns, in plain PyTorch."""

# Shape legend: N rows, D columns, B bytes of a packed row, T tiles in a row, R rows processed at a time, C columns of a
# tile (128), V numbers of a row (D, or D + 1 if D is odd).

import torch
from torch import Tensor
from torch.nn import functional

from kernels.quantize.layout import E5M6_MIN_AMAX, PackedE5M6, check_numbers, check_packed, num_pairs, num_tiles
from kernels.quantize.reference import CHUNK_NUMBERS, split_into_tiles

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
        values_RTC = split_into_tiles(rows_ND[chunk].float())
        scales_RT1 = _scales(values_RTC.abs().amax(dim=2, keepdim=True))
        halves_RTC = _rounded(values_RTC / scales_RT1).half().view(torch.int16)
        finite_RT1 = scales_RT1.isfinite()
        if not finite_RT1.all():
            halves_RTC.masked_fill_(~finite_RT1, NAN_HALF)
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
        lower_RV, pairs_RV = codes_NB[chunk, :num_lower].short(), codes_NB[chunk, num_lower:].short()
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
