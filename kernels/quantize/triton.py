"""FP8 codes with a scale per 1 x 128 of rows or 128 x 128 of weights, bit-equal to reference.py.

All kernels are memory-bound: each number is read once and written once. The first functions apply the reference's rule
to numbers in the registers of any kernel, and so give the same bits.

    kernel            grid                    tile              accumulator         rounding
    quantize          N / block_rows * tiles  rows x 128        amax in int32, so   scale: division to nearest even, or
    quantize_blocks   (T, M, E)               128 x 128         that a NaN is the   up to a power of two; codes:
                                                                largest             division, then to e4m3, both to
                                                                                    nearest even
    dequantize        N / block_rows * tiles  rows x 128        none                product in float32 (float64 for a
                                                                                    float64 result), to nearest even
    dequantize_blocks (T, M, E)               128 x 128         none                product in float32, likewise
    transpose_blocks  (T, M, E)               128 x 128 bytes   none                none

Tiles of the same rows are adjacent in the grid, so that concurrent programs read memory sequentially. Codes are
transposed by tiles because torch copies single bytes along columns; torch transposes the few scales.
"""

# Shape legend: as there; T tiles or blocks in a row.

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import launch_kernel
from kernels.operation import check_columns
from kernels.quantize.layout import (
    TILE,
    Quantized,
    QuantizedBlocks,
    check_min_amax,
    check_numbers,
    check_quantized,
    check_quantized_blocks,
    empty_quantized,
    num_tiles,
)

LARGEST = tl.constexpr(448.0)
MAGNITUDE_BITS = tl.constexpr(0x7FFFFFFF)
INFINITY_BITS = tl.constexpr(0x7F800000)
NAN_BITS = tl.constexpr(0x7FC00000)
MANTISSA_BITS = tl.constexpr(0x007FFFFF)
RECIPROCAL_BITS = tl.constexpr(0x7F000000)


@triton.jit  # type: ignore[untyped-decorator]
def largest_bits(values: tl.tensor, AXIS: tl.constexpr) -> tl.tensor:
    """Returns the bits, int32, of the largest float32 magnitude along AXIS, kept with length 1; NaN wins."""
    return tl.max(values.to(tl.int32, bitcast=True) & MAGNITUDE_BITS, axis=AXIS, keep_dims=True)


@triton.jit  # type: ignore[untyped-decorator]
def compute_scales(amax_bits: tl.tensor, min_amax: tl.tensor, POWER_OF_TWO: tl.constexpr) -> tl.tensor:
    """Computes float32 scales from the bits of largest magnitudes; NaN if a magnitude is not finite."""
    # The bits of magnitudes are ordered as the magnitudes are, with infinity and NaN above all numbers.
    finite = amax_bits < INFINITY_BITS
    amax = tl.where(finite, amax_bits, 0).to(tl.float32, bitcast=True)
    scale_bits = tl.div_rn(tl.maximum(amax, min_amax), LARGEST).to(tl.int32, bitcast=True)
    if POWER_OF_TWO:
        # Adding the mantissa's mask carries into the exponent unless the number is a power of two already.
        scale_bits = (scale_bits + MANTISSA_BITS) & INFINITY_BITS
    return tl.where(finite, scale_bits, NAN_BITS).to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def compute_codes(values: tl.tensor, scales: tl.tensor, POWER_OF_TWO: tl.constexpr) -> tl.tensor:
    """Computes e4m3 codes: float32 `value / scale` to nearest even, then to e4m3 to nearest even.

    No quotient rounds to more than 448. If scales are not powers of two, a division per number would cost more than its
    memory traffic. Instead, one reciprocal per scale is used, and its remainder, exact in fused arithmetic, is divided
    again. For every scale in [1, 2) this gives the bits of the division near all numbers at which codes change, as a
    test of all 2**23 scales shows; powers of two extend this to all scales, from 2**-126 to 2**120.
    """
    # 2**-e of a scale 2**e m by its exponent bits: exact, and without a division.
    scale_bits = scales.to(tl.int32, bitcast=True)
    inverse_power = (-(scale_bits & INFINITY_BITS) + RECIPROCAL_BITS).to(tl.float32, bitcast=True)
    if POWER_OF_TWO:
        scaled = values * inverse_power
    else:
        mantissa = scales * inverse_power
        # Negating twice keeps the sign of a zero, whose remainder is +0.
        inverse_mantissa = tl.div_rn(-1.0, mantissa)
        negated = values * (inverse_power * -1.0)
        quotient = negated * inverse_mantissa
        scaled = tl.fma(tl.fma(quotient, mantissa, negated), inverse_mantissa, quotient)
    # A scale that is NaN makes all codes of its tile NaN.
    return tl.where(scales == scales, scaled, scales).to(tl.float8e4nv)


@triton.jit  # type: ignore[untyped-decorator]
def tile_of_program(
    num_columns: tl.tensor, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Returns rows, columns and number of this program's tile; tiles of the same rows are adjacent."""
    num_tiles = tl.cdiv(num_columns, BLOCK_COLUMNS)
    row_block = (tl.program_id(0) // num_tiles).to(tl.int64)
    tile = tl.program_id(0) - row_block * num_tiles
    row = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    return row[:, None], (tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS))[None, :], tile


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
    # A program owns one tile of 128 columns in BLOCK_ROWS rows.
    row, column, tile = tile_of_program(num_columns, BLOCK_ROWS, BLOCK_COLUMNS)
    inside = (row < num_rows) & (column < num_columns)
    values = tl.load(rows + row * rows_stride + column, mask=inside, other=0.0).to(tl.float32)
    scale = compute_scales(largest_bits(values, 1), min_amax, POWER_OF_TWO)
    tl.store(codes + row * num_columns + column, compute_codes(values, scale, POWER_OF_TWO), mask=inside)
    tl.store(scales + row * tl.cdiv(num_columns, BLOCK_COLUMNS) + tile, scale, mask=row < num_rows)


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
    row, column, tile = tile_of_program(num_columns, BLOCK_ROWS, BLOCK_COLUMNS)
    in_rows = row < num_rows
    inside = in_rows & (column < num_columns)
    # One scale for each row of the tile.
    code = tl.load(codes + row * codes_stride + column, mask=inside, other=0.0)
    scale = tl.load(scales + row * scales_stride + tile, mask=in_rows, other=0.0)
    product = code.to(tl.float32).to(WIDE) * scale.to(WIDE)
    tl.store(rows + row * num_columns + column, product.to(rows.dtype.element_ty), mask=inside)


def quantize_1x128(
    rows_ND: Tensor, *, power_of_two: bool, min_amax: float = 1e-4, block_rows: int = 16, num_warps: int = 4
) -> Quantized:
    """Implements `reference.quantize_1x128` for contiguous columns; `block_rows` rows per program."""
    check_min_amax(min_amax)
    check_numbers("quantize_1x128: rows_ND", rows_ND, 2)
    num_rows, num_columns = rows_ND.shape
    quantized = empty_quantized(rows_ND, num_rows, num_columns)
    check_columns("quantize_1x128", rows_ND=rows_ND)
    launch_kernel(
        quantize_kernel,
        (rows_ND, *quantized),
        (num_rows, num_columns),
        (block_rows, TILE),
        min_amax=float(min_amax),
        POWER_OF_TWO=power_of_two,
        num_warps=num_warps,
    )
    return quantized


def dequantize_1x128(quantized: Quantized, dtype: torch.dtype, *, block_rows: int = 16, num_warps: int = 4) -> Tensor:
    """Implements `reference.dequantize_1x128` for contiguous columns; `block_rows` rows per program."""
    check_quantized("dequantize_1x128", *quantized)
    codes_ND, scales_NT = quantized
    num_rows, num_columns = codes_ND.shape
    rows_ND = codes_ND.new_empty(num_rows, num_columns, dtype=dtype)
    check_columns("dequantize_1x128", codes=codes_ND, scales=scales_NT)
    tensors = (codes_ND, scales_NT, rows_ND)
    launch_kernel(dequantize_kernel, tensors, (num_rows, num_columns), (block_rows, TILE), num_warps=num_warps)
    return rows_ND


@triton.jit  # type: ignore[untyped-decorator]
def _block_of(
    num_rows: tl.tensor, num_columns: tl.tensor, row_stride: tl.tensor, stride: tl.tensor, TILE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Returns offsets of a program's block in strided matrices, and the mask of valid elements."""
    rows = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)[:, None]
    columns = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)[None, :]
    first = tl.program_id(2).to(tl.int64) * stride
    return first + rows * row_stride + columns, (rows < num_rows) & (columns < num_columns)


@triton.jit  # type: ignore[untyped-decorator]
def _scale_place() -> tl.tensor:
    row = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    return row * tl.num_programs(0) + tl.program_id(0)


@triton.jit(do_not_specialize=["min_amax"])  # type: ignore[untyped-decorator]
def quantize_blocks_kernel(
    values: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    row_stride: tl.tensor,
    stride: tl.tensor,
    min_amax: tl.tensor,
    POWER_OF_TWO: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Quantizes one block."""
    source, inside = _block_of(num_rows, num_columns, row_stride, stride, TILE)
    numbers = tl.load(values + source, mask=inside, other=0.0).to(tl.float32)
    # One magnitude for the block, 1 x 1: first along rows, then along columns.
    largest = tl.max(largest_bits(numbers, 1), axis=0, keep_dims=True)
    scale = compute_scales(largest, min_amax, POWER_OF_TWO)
    # Codes are contiguous, while the values may be strided.
    target, _ = _block_of(num_rows, num_columns, num_columns, tl.cast(num_rows, tl.int64) * num_columns, TILE)
    tl.store(codes + target, compute_codes(numbers, scale, POWER_OF_TWO), mask=inside)
    tl.store(scales + _scale_place(), tl.sum(scale))


@triton.jit  # type: ignore[untyped-decorator]
def dequantize_blocks_kernel(
    codes: tl.tensor,
    scales: tl.tensor,
    values: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    row_stride: tl.tensor,
    stride: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    """Multiplies one block by its scale."""
    source, inside = _block_of(num_rows, num_columns, row_stride, stride, TILE)
    code = tl.load(codes + source, mask=inside, other=0.0)
    product = code.to(tl.float32) * tl.load(scales + _scale_place())
    target, _ = _block_of(num_rows, num_columns, num_columns, tl.cast(num_rows, tl.int64) * num_columns, TILE)
    tl.store(values + target, product.to(values.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def transpose_blocks_kernel(
    source_bytes: tl.tensor,
    target_bytes: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    row_stride: tl.tensor,
    stride: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    """Transposes one block of bytes."""
    source, inside = _block_of(num_rows, num_columns, row_stride, stride, TILE)
    block = tl.trans(tl.load(source_bytes + source, mask=inside, other=0))
    # The block at row m and column t becomes that at row t and column m.
    rows = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)[:, None]
    columns = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)[None, :]
    first = tl.program_id(2).to(tl.int64) * num_rows * num_columns
    writable = (rows < num_columns) & (columns < num_rows)
    tl.store(target_bytes + first + rows * num_rows + columns, block, mask=writable)


def quantize_128x128(
    values: Tensor, *, power_of_two: bool, min_amax: float = 1e-4, num_warps: int = 8
) -> QuantizedBlocks:
    """Implements `reference.quantize_128x128` for contiguous columns."""
    check_min_amax(min_amax)
    check_numbers("quantize_128x128: values", values)
    *leading, num_rows, num_columns = values.shape
    codes = values.new_empty(values.shape, dtype=torch.float8_e4m3fn)
    scales = values.new_empty(*leading, num_tiles(num_rows), num_tiles(num_columns), dtype=torch.float32)
    check_columns("quantize_128x128", values=values)
    _launch_blocks(
        quantize_blocks_kernel,
        values,
        (codes, scales),
        min_amax=float(min_amax),
        POWER_OF_TWO=power_of_two,
        num_warps=num_warps,
    )
    return QuantizedBlocks(codes, scales)


def dequantize_128x128(quantized: QuantizedBlocks, dtype: torch.dtype, *, num_warps: int = 8) -> Tensor:
    """Implements `reference.dequantize_128x128` for contiguous columns."""
    check_quantized_blocks("dequantize_128x128", *quantized)
    codes, scales = quantized
    values = codes.new_empty(codes.shape, dtype=dtype)
    check_columns("dequantize_128x128", codes=codes)
    _launch_blocks(dequantize_blocks_kernel, codes, (scales.contiguous(), values), num_warps=num_warps)
    return values


def transpose_blocks(quantized: QuantizedBlocks, *, num_warps: int = 8) -> QuantizedBlocks:
    """Implements `reference.transpose_blocks` for contiguous columns."""
    check_quantized_blocks("transpose_blocks", *quantized)
    codes, scales = quantized
    transposed = codes.new_empty(codes.mT.shape)
    check_columns("transpose_blocks", codes=codes)
    results = (transposed.view(torch.uint8),)
    _launch_blocks(transpose_blocks_kernel, codes.view(torch.uint8), results, num_warps=num_warps)
    return QuantizedBlocks(transposed, scales.mT.contiguous())


def _launch_blocks(kernel: Any, source: Tensor, results: tuple[Tensor, ...], **values: Any) -> None:
    """Launches a program per block of one or several matrices."""
    source_END = source.flatten(0, -3) if source.dim() > 2 else source.unsqueeze(0)
    num_matrices, num_rows, num_columns = source_END.shape
    sizes = (num_rows, num_columns, source_END.stride(1), source_END.stride(0))
    grid = (num_tiles(num_columns), num_tiles(num_rows), num_matrices)
    launch_kernel(kernel, (source_END, *results), sizes, grid=grid, **values)
