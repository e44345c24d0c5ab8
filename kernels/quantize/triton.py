"""FP8 codes with one scale per row and 128 columns, in Triton: bit-equal to kernels/quantize/reference.py.

Both kernels are bound by memory: each number is read once and written once.

    kernel     grid                     tile               accumulator            rounding
    quantize   (N / block_rows, tiles)  rows x 128 columns amax in int32, so that scale: division to nearest even,
                                                           a NaN is the largest   or up to a power of two; codes:
                                                                                  division to nearest even, then
                                                                                  to e4m3 to nearest even, saturated
    dequantize (N / block_rows, tiles)  rows x 128 columns none                   product in float32 (float64 for a
                                                                                  float64 result), then to nearest even

Every offset of a row is computed in int64. Masks: rows beyond the last and columns beyond the last (zeros, which change
no amax). Tensors must be on the current device. Shape legend: N rows, D columns, T tiles in a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.quantize.layout import LARGEST_CODE, TILE, Quantized, check_min_amax, num_tiles

INFINITY_BITS = tl.constexpr(0x7F800000)
NAN_BITS = tl.constexpr(0x7FC00000)
MANTISSA_BITS = tl.constexpr(0x007FFFFF)
RECIPROCAL_BITS = tl.constexpr(0x7F000000)


@triton.jit(do_not_specialize=["num_rows", "min_amax"])  # type: ignore[untyped-decorator]
def quantize_kernel(
    rows: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    rows_stride: tl.tensor,
    min_amax: tl.tensor,
    POWER_OF_TWO: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
) -> None:
    """Quantises one tile of each of BLOCK_ROWS rows."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    tile = tl.program_id(1)
    columns = tile.to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = (row < num_rows)[:, None] & (columns < num_columns)[None, :]
    values = tl.load(rows + row[:, None] * rows_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    # Bits of non-negative floats order as the floats do, and those of a NaN come last; a float maximum may drop it.
    amax_bits = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    finite = amax_bits < INFINITY_BITS
    amax = tl.where(finite, amax_bits, 0).to(tl.float32, bitcast=True)
    scale = tl.div_rn(tl.maximum(amax, min_amax), LARGEST)
    if POWER_OF_TWO:
        # Adding the mantissa's mask carries into the exponent unless the number is a power of two already.
        scale_bits = (scale.to(tl.int32, bitcast=True) + MANTISSA_BITS) & INFINITY_BITS
        scale = scale_bits.to(tl.float32, bitcast=True)
        scaled = values * (-scale_bits + RECIPROCAL_BITS).to(tl.float32, bitcast=True)[:, None]
    else:
        scaled = tl.div_rn(values, tl.broadcast_to(scale[:, None], values.shape))
    not_a_number = tl.full((BLOCK_ROWS,), NAN_BITS, tl.int32).to(tl.float32, bitcast=True)
    scaled = tl.minimum(tl.maximum(scaled, -LARGEST), LARGEST)
    scaled = tl.where(finite[:, None], scaled, not_a_number[:, None])
    tl.store(codes + row[:, None] * num_columns + columns[None, :], scaled.to(codes.dtype.element_ty), mask=inside)
    num_tiles = tl.cdiv(num_columns, BLOCK_COLUMNS)
    tl.store(scales + row * num_tiles + tile, tl.where(finite, scale, not_a_number), mask=row < num_rows)


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def dequantize_kernel(
    codes: tl.tensor,
    scales: tl.tensor,
    rows: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    codes_stride: tl.tensor,
    scales_stride: tl.tensor,
    WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
) -> None:
    """Multiplies one tile of each of BLOCK_ROWS rows by its scale."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    tile = tl.program_id(1)
    columns = tile.to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    in_rows = row < num_rows
    inside = in_rows[:, None] & (columns < num_columns)[None, :]
    code = tl.load(codes + row[:, None] * codes_stride + columns[None, :], mask=inside, other=0.0)
    scale = tl.load(scales + row * scales_stride + tile, mask=in_rows, other=0.0)
    product = code.to(tl.float32).to(WIDE) * scale.to(WIDE)[:, None]
    tl.store(rows + row[:, None] * num_columns + columns[None, :], product.to(rows.dtype.element_ty), mask=inside)


def quantize_1x128(
    rows_ND: Tensor, power_of_two: bool, min_amax: float = 1e-4, *, block_rows: int = 16, num_warps: int = 4
) -> Quantized:
    """Codes and scales of rows, tile by tile (arXiv:2412.19437, section 3.3.2).

    A tile's scale is `max(amax, min_amax) / 448`, in float32; codes are `value / scale`, rounded to nearest even and
    saturated at 448. A tile with a NaN or an infinity becomes all NaN, scale and codes. The last tile may be ragged.

    Args:
        rows_ND: floating point, read as float32; its rows may lie apart in memory, its columns not.
        power_of_two: round the scale up to a power of two, so that quantising again loses nothing.
        min_amax: lower bound of a tile's amax; in [2**-117, 2**127], so that a scale is a normal number.
        block_rows: rows that a program works on; a power of two.
        num_warps: of a program.

    Raises:
        ValueError: min_amax out of bounds, or the columns are not contiguous.
    """
    check_min_amax(min_amax)
    num_rows, num_columns = rows_ND.shape
    tiles = num_tiles(num_columns)
    codes_ND = rows_ND.new_empty(num_rows, num_columns, dtype=torch.float8_e4m3fn)
    scales_NT = rows_ND.new_empty(num_rows, tiles, dtype=torch.float32)
    if num_rows == 0 or num_columns == 0:
        return Quantized(codes_ND, scales_NT)
    _check_columns("quantize_1x128: rows_ND", rows_ND)
    quantize_kernel[(triton.cdiv(num_rows, block_rows), tiles)](
        rows_ND,
        codes_ND,
        scales_NT,
        num_rows,
        num_columns,
        rows_ND.stride(0),
        float(min_amax),
        POWER_OF_TWO=power_of_two,
        LARGEST=LARGEST_CODE,
        BLOCK_ROWS=block_rows,
        BLOCK_COLUMNS=TILE,
        num_warps=num_warps,
        enable_fp_fusion=False,
    )
    return Quantized(codes_ND, scales_NT)


def dequantize_1x128(quantized: Quantized, dtype: torch.dtype, *, block_rows: int = 16, num_warps: int = 4) -> Tensor:
    """Rows from codes and scales.

    Args:
        quantized: codes float8_e4m3fn [N, D] and scales float32 [N, ceil(D / 128)], their columns contiguous.
        dtype: of the result.
        block_rows: rows that a program works on; a power of two.
        num_warps: of a program.

    Returns:
        rows_ND: code times scale in float32 (float64 where that is the dtype), rounded to `dtype`.

    Raises:
        ValueError: the columns are not contiguous.
    """
    codes_ND, scales_NT = quantized
    num_rows, num_columns = codes_ND.shape
    rows_ND = codes_ND.new_empty(num_rows, num_columns, dtype=dtype)
    if num_rows == 0 or num_columns == 0:
        return rows_ND
    _check_columns("dequantize_1x128: codes", codes_ND)
    _check_columns("dequantize_1x128: scales", scales_NT)
    dequantize_kernel[(triton.cdiv(num_rows, block_rows), num_tiles(num_columns))](
        codes_ND,
        scales_NT,
        rows_ND,
        num_rows,
        num_columns,
        codes_ND.stride(0),
        scales_NT.stride(0),
        WIDE=tl.float64 if dtype == torch.float64 else tl.float32,
        BLOCK_ROWS=block_rows,
        BLOCK_COLUMNS=TILE,
        num_warps=num_warps,
        enable_fp_fusion=False,
    )
    return rows_ND


def _check_columns(subject: str, matrix: Tensor) -> None:
    if matrix.shape[1] > 1 and matrix.stride(1) != 1:
        raise ValueError(f"{subject} must be contiguous along its columns, got strides {matrix.stride()}")
