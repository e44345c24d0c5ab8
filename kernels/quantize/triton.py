"""FP8 codes with one scale per row and 128 columns, in Triton: bit-equal to reference.py.

Both kernels are memory-bound: each number is read once and written once.

    kernel     grid                     tile               accumulator            rounding
    quantize   N / block_rows * tiles   rows x 128 columns amax in int32, so that scale: division to nearest even,
                                                           a NaN is the largest   or up to a power of two; codes:
                                                                                  division to nearest even, then
                                                                                  to e4m3 to nearest even
    dequantize N / block_rows * tiles   rows x 128 columns none                   product in float32 (float64 for a
                                                                                  float64 result), then to nearest even

Tiles of the same rows are adjacent in the grid, so that concurrent programs read memory sequentially.

Row offsets are int64. Masks exclude rows and columns beyond the last (zeros, which do not change the amax). Tensors
must be on the current device. Shape legend: N rows, D columns, T tiles in a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.quantize.layout import (
    TILE,
    Quantized,
    check_columns,
    check_min_amax,
    check_numbers,
    check_quantized,
    num_tiles,
)
from kernels.quantize.tile import compute_codes, compute_scales, largest_bits


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
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
) -> None:
    """Quantizes one tile of each of BLOCK_ROWS rows."""
    num_tiles = tl.cdiv(num_columns, BLOCK_COLUMNS)
    row_block = (tl.program_id(0) // num_tiles).to(tl.int64)
    tile = tl.program_id(0) - row_block * num_tiles
    row = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = (row < num_rows)[:, None] & (columns < num_columns)[None, :]
    values = tl.load(rows + row[:, None] * rows_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    scale = compute_scales(largest_bits(values, 1), min_amax, POWER_OF_TWO)
    tl.store(
        codes + row[:, None] * num_columns + columns[None, :], compute_codes(values, scale, POWER_OF_TWO), mask=inside
    )
    tl.store(scales + row[:, None] * num_tiles + tile, scale, mask=(row < num_rows)[:, None])


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
    num_tiles = tl.cdiv(num_columns, BLOCK_COLUMNS)
    row_block = (tl.program_id(0) // num_tiles).to(tl.int64)
    tile = tl.program_id(0) - row_block * num_tiles
    row = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    in_rows = row < num_rows
    inside = in_rows[:, None] & (columns < num_columns)[None, :]
    code = tl.load(codes + row[:, None] * codes_stride + columns[None, :], mask=inside, other=0.0)
    scale = tl.load(scales + row * scales_stride + tile, mask=in_rows, other=0.0)
    product = code.to(tl.float32).to(WIDE) * scale.to(WIDE)[:, None]
    tl.store(rows + row[:, None] * num_columns + columns[None, :], product.to(rows.dtype.element_ty), mask=inside)


def quantize_1x128(
    rows_ND: Tensor, *, power_of_two: bool, min_amax: float = 1e-4, block_rows: int = 16, num_warps: int = 4
) -> Quantized:
    """Quantizes rows tile by tile (arXiv:2412.19437, section 3.3.2).

    A tile's scale is `max(amax, min_amax) / 448`, in float32; codes are `value / scale`, rounded to nearest even and
    saturated at 448. A tile with a NaN or an infinity becomes all NaN, scale and codes. The last tile may be ragged.

    Args:
        rows_ND: floating point, read as float32; rows may be strided, columns must be contiguous.
        power_of_two: whether to round the scale up to a power of two, so that quantizing again is exact.
        min_amax: lower bound of a tile's amax, in [2**-117, 2**127], so that a scale is a normal number.
        block_rows: rows per program, a power of two.

    Raises:
        ValueError: min_amax is out of range, rows have an unsupported type or shape, or columns are not contiguous.
    """
    check_min_amax(min_amax)
    check_numbers("quantize_1x128: rows_ND", rows_ND, 2)
    num_rows, num_columns = rows_ND.shape
    tiles = num_tiles(num_columns)
    codes_ND = rows_ND.new_empty(num_rows, num_columns, dtype=torch.float8_e4m3fn)
    scales_NT = rows_ND.new_empty(num_rows, tiles, dtype=torch.float32)
    if num_rows == 0 or num_columns == 0:
        return Quantized(codes_ND, scales_NT)
    check_columns("quantize_1x128: rows_ND", rows_ND)
    quantize_kernel[(triton.cdiv(num_rows, block_rows) * tiles,)](
        rows_ND,
        codes_ND,
        scales_NT,
        num_rows,
        num_columns,
        rows_ND.stride(0),
        float(min_amax),
        POWER_OF_TWO=power_of_two,
        BLOCK_ROWS=block_rows,
        BLOCK_COLUMNS=TILE,
        num_warps=num_warps,
        enable_fp_fusion=False,
    )
    return Quantized(codes_ND, scales_NT)


def dequantize_1x128(quantized: Quantized, dtype: torch.dtype, *, block_rows: int = 16, num_warps: int = 4) -> Tensor:
    """Restores rows from codes and scales.

    Args:
        quantized: codes float8_e4m3fn [N, D] and scales float32 [N, ceil(D / 128)], their columns contiguous.
        block_rows: rows per program, a power of two.

    Returns:
        rows_ND: code times scale in float32 (float64 if that is the dtype), rounded to `dtype`.

    Raises:
        ValueError: codes or scales have an unsupported type or shape or do not match, or columns are not contiguous.
    """
    check_quantized("dequantize_1x128", *quantized)
    codes_ND, scales_NT = quantized
    num_rows, num_columns = codes_ND.shape
    rows_ND = codes_ND.new_empty(num_rows, num_columns, dtype=dtype)
    if num_rows == 0 or num_columns == 0:
        return rows_ND
    check_columns("dequantize_1x128: codes", codes_ND)
    check_columns("dequantize_1x128: scales", scales_NT)
    dequantize_kernel[(triton.cdiv(num_rows, block_rows) * num_tiles(num_columns),)](
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
