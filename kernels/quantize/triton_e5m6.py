"""Rows in 12 bits per number with a scale per 128 columns, in Triton: bit-equal to reference.py.

Both kernels are memory-bound: each number is read once and written once.

    kernel  grid                     tile                accumulator                rounding
    pack    N / block_rows * tiles   rows x 128 columns  amax in int32, so that a   scale: up to a power of two; codes:
                                                         NaN is the largest         once, to nearest even
    unpack  N / block_rows * tiles   rows x 128 columns  none                       product in float32 (float64 for a
                                                                                    float64 result), to nearest even
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import launch_kernel
from kernels.operation import check_columns
from kernels.quantize.layout import E5M6_MIN_AMAX, TILE, PackedE5M6, check_numbers, check_packed, num_pairs, num_tiles
from kernels.quantize.triton import INFINITY_BITS, NAN_BITS, RECIPROCAL_BITS, largest_bits, tile_of_program

SIGN_BIT = tl.constexpr(-(2**31))
NAN_HALF = tl.constexpr(0x7E00)
BEYOND_65024 = tl.constexpr(0x7FFFFF - 0x7E0000)
EXPONENT_15 = tl.constexpr(15 << 23)
SMALLEST_EXPONENT = tl.constexpr(127 - 14 << 23)
LARGE = tl.constexpr((17 << 23) + (1 << 22))


@triton.jit  # type: ignore[untyped-decorator]
def _halves_of(values: tl.tensor, scale_bits: tl.tensor, finite: tl.tensor) -> tl.tensor:
    """Returns the bits of IEEE half precision, with the last 4 bits 0, in int16."""
    inverse = (-scale_bits + RECIPROCAL_BITS).to(tl.float32, bitcast=True)
    scaled = tl.where(finite, values * inverse, 0.0)
    bits = scaled.to(tl.int32, bitcast=True)
    # The last bit of a float near 1.5 * 2**17 times the value's power of two, or times 2**-14, is the last bit to keep.
    large_bits = tl.maximum(bits & INFINITY_BITS, SMALLEST_EXPONENT) + LARGE
    large = large_bits.to(tl.float32, bitcast=True)
    rounded = (scaled + large) - large
    # A number that was rounded to zero has lost its sign.
    signed = (rounded.to(tl.int32, bitcast=True) | (bits & SIGN_BIT)).to(tl.float32, bitcast=True)
    return tl.where(finite, signed.to(tl.float16).to(tl.int16, bitcast=True), NAN_HALF)


@triton.jit(do_not_specialize=["num_rows", "min_amax"])  # type: ignore[untyped-decorator]
def pack_kernel(
    rows: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    num_pairs: tl.tensor,
    rows_stride: tl.tensor,
    min_amax: tl.tensor,
    BLOCK_ROWS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Packs one tile of each of BLOCK_ROWS rows."""
    row, columns, tile = tile_of_program(num_columns, BLOCK_ROWS, TILE)
    in_rows = row < num_rows
    inside = in_rows & (columns < num_columns)
    values = tl.load(rows + row * rows_stride + columns, mask=inside, other=0.0).to(tl.float32)
    amax_bits = largest_bits(values, 1)
    finite = amax_bits < INFINITY_BITS
    amax = tl.maximum(tl.where(finite, amax_bits, 0).to(tl.float32, bitcast=True), min_amax)
    # 65024 is 2**15 times a mantissa of 0x7E0000: above that mantissa, the sum carries into the exponent.
    scale_bits = ((amax.to(tl.int32, bitcast=True) + BEYOND_65024) & INFINITY_BITS) - EXPONENT_15
    # The padding of a row is 0 even in a tile that is NaN.
    halves = _halves_of(values, scale_bits, finite | (columns >= num_columns))
    packed = codes + row * 3 * num_pairs
    tl.store(packed + columns, (halves >> 4).to(tl.uint8), mask=in_rows & (columns < 2 * num_pairs))
    even, odd = tl.split(((halves >> 12) & 0xF).to(tl.uint8).reshape(BLOCK_ROWS, TILE // 2, 2))
    pairs = tile * (TILE // 2) + tl.arange(0, TILE // 2)[None, :]
    tl.store(packed + 2 * num_pairs + pairs, even | (odd << 4), mask=in_rows & (pairs < num_pairs))
    scale = tl.where(finite, scale_bits, NAN_BITS).to(tl.float32, bitcast=True)
    tl.store(scales + row * tl.cdiv(num_columns, TILE) + tile, scale, mask=in_rows)


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def unpack_kernel(
    codes: tl.tensor,
    scales: tl.tensor,
    rows: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    num_pairs: tl.tensor,
    codes_stride: tl.tensor,
    scales_stride: tl.tensor,
    WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Unpacks one tile of each of BLOCK_ROWS rows."""
    row, columns, tile = tile_of_program(num_columns, BLOCK_ROWS, TILE)
    pairs = tile * (TILE // 2) + tl.arange(0, TILE // 2)[None, :]
    in_rows = row < num_rows
    inside = in_rows & (columns < num_columns)
    packed = codes + row * codes_stride
    # The lower 8 bits of a number, and the byte that holds its upper 4 bits and those of its neighbor.
    lower = tl.load(packed + columns, mask=inside, other=0)
    two = tl.load(packed + 2 * num_pairs + pairs, mask=in_rows & (pairs < num_pairs), other=0)
    upper = tl.join(two & 0xF, two >> 4).reshape(BLOCK_ROWS, TILE)
    # The shift moves the sign to bit 15, which gives IEEE half precision.
    halves = ((upper.to(tl.int16) << 12) | (lower.to(tl.int16) << 4)).to(tl.float16, bitcast=True)
    scale = tl.load(scales + row * scales_stride + tile, mask=in_rows, other=0.0)
    product = halves.to(tl.float32).to(WIDE) * scale.to(WIDE)
    tl.store(rows + row * num_columns + columns, product.to(rows.dtype.element_ty), mask=inside)


def pack_e5m6(rows_ND: Tensor, *, block_rows: int = 16, num_warps: int = 4) -> PackedE5M6:
    """Implements `reference.pack_e5m6` for contiguous columns; `block_rows` rows per program."""
    check_numbers("pack_e5m6: rows_ND", rows_ND, 2)
    num_rows, num_columns = rows_ND.shape
    pairs = num_pairs(num_columns)
    tiles = num_tiles(num_columns)
    codes_NB = rows_ND.new_empty(num_rows, 3 * pairs, dtype=torch.uint8)
    scales_NT = rows_ND.new_empty(num_rows, tiles, dtype=torch.float32)
    check_columns("pack_e5m6", rows_ND=rows_ND)
    launch_kernel(
        pack_kernel,
        (rows_ND, codes_NB, scales_NT),
        (num_rows, num_columns, pairs),
        (block_rows, TILE),
        min_amax=E5M6_MIN_AMAX,
        num_warps=num_warps,
    )
    return PackedE5M6(codes_NB, scales_NT)


def unpack_e5m6(
    packed: PackedE5M6, num_columns: int, dtype: torch.dtype, *, block_rows: int = 16, num_warps: int = 4
) -> Tensor:
    """Implements `reference.unpack_e5m6` for contiguous columns; `block_rows` rows per program."""
    check_packed(packed, num_columns)
    codes_NB, scales_NT = packed
    num_rows = codes_NB.shape[0]
    rows_ND = codes_NB.new_empty(num_rows, num_columns, dtype=dtype)
    check_columns("unpack_e5m6", codes=codes_NB, scales=scales_NT)
    sizes = (num_rows, num_columns, num_pairs(num_columns))
    launch_kernel(unpack_kernel, (codes_NB, scales_NT, rows_ND), sizes, (block_rows, TILE), num_warps=num_warps)
    return rows_ND
