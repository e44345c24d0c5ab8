"""Transposed FP8 codes with a scale per column and 128 rows of a group, in Triton.

Results are bit-equal to reference.py. Both kernels are memory-bound: each number is read once and written once,
both in contiguous runs. In between, a tile of codes, one byte each, is transposed in shared memory. `quantize` also
writes codes by rows if they are wanted, in tiles of 128 x 128.

    kernel     grid                        tile                      accumulator            rounding
    quantize   (D / block_columns, tiles)  128 rows x block_columns  amax in int32, so that scale: division to nearest
                                                                     a NaN is the largest   even, or up to a power of
                                                                                            two; codes: division to
                                                                                            nearest even, then to e4m3
    requantize (D / block_columns, tiles)  128 rows x block_columns  as above               product of code and scale in
                                                                                            float32, then as above

The host computes the first and last row of each tile and copies them asynchronously. If there is one group, they follow
from the tile's number.
"""

# Shape legend: as there, and T tiles in all.

from collections.abc import Sequence
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
    QuantizedColumns,
    check_counts,
    check_min_amax,
    check_numbers,
    check_quantized,
    empty_quantized,
    num_tiles,
    padded_rows,
)
from kernels.quantize.triton import compute_codes, compute_scales, largest_bits


@triton.jit  # type: ignore[untyped-decorator]
def _rows_of(
    bounds: tl.tensor, num_rows: tl.tensor, GROUPED: tl.constexpr, BLOCK_ROWS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Returns the rows of a program's tile, and the mask of valid ones."""
    first = tl.program_id(1).to(tl.int64) * BLOCK_ROWS
    end = num_rows
    if GROUPED:
        first = tl.load(bounds + 2 * tl.program_id(1)).to(tl.int64)
        end = tl.load(bounds + 2 * tl.program_id(1) + 1)
    row = first + tl.arange(0, BLOCK_ROWS)
    return row, row < end


@triton.jit  # type: ignore[untyped-decorator]
def _columns_of(VECTOR: tl.constexpr, BLOCK_COLUMNS: tl.constexpr) -> tl.tensor:
    """Returns the columns of a program, laid out so that a thread holds VECTOR adjacent ones."""
    columns = tl.program_id(0).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    return tl.max_contiguous(tl.multiple_of(columns, VECTOR), VECTOR)


@triton.jit  # type: ignore[untyped-decorator]
def _store_columns(
    values: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    columns: tl.tensor,
    num_columns: tl.tensor,
    num_tiles: tl.tensor,
    min_amax: tl.tensor,
    POWER_OF_TWO: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
) -> None:
    """Quantizes a tile of float32 numbers, rows x columns, and stores its transpose."""
    scale = compute_scales(largest_bits(values, 0), min_amax, POWER_OF_TWO)
    code = tl.trans(compute_codes(values, scale, POWER_OF_TWO))
    in_columns = (columns < num_columns)[:, None]
    tile = columns[:, None] * num_tiles + tl.program_id(1)
    tl.store(codes + tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[None, :], code, mask=in_columns)
    tl.store(scales + tile, tl.trans(scale), mask=in_columns)


@triton.jit(do_not_specialize=["num_rows", "num_tiles", "min_amax"])  # type: ignore[untyped-decorator]
def quantize_columns_kernel(
    rows: tl.tensor,
    bounds: tl.tensor,
    row_codes: tl.tensor,
    row_scales: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    num_tiles: tl.tensor,
    rows_stride: tl.tensor,
    min_amax: tl.tensor,
    POWER_OF_TWO: tl.constexpr,
    GROUPED: tl.constexpr,
    WITH_ROWS: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
) -> None:
    """Quantizes BLOCK_COLUMNS columns of one tile of rows; WITH_ROWS: 128, and by rows too."""
    row, in_rows = _rows_of(bounds, num_rows, GROUPED, BLOCK_ROWS)
    columns = _columns_of(VECTOR, BLOCK_COLUMNS)
    inside = in_rows[:, None] & (columns < num_columns)[None, :]
    values = tl.load(rows + row[:, None] * rows_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    if WITH_ROWS:
        scale = compute_scales(largest_bits(values, 1), min_amax, POWER_OF_TWO)
        code = compute_codes(values, scale, POWER_OF_TWO)
        tl.store(row_codes + row[:, None] * num_columns + columns[None, :], code, mask=inside)
        row_tile = row[:, None] * tl.num_programs(0) + tl.program_id(0)
        tl.store(row_scales + row_tile, scale, mask=in_rows[:, None])
    _store_columns(values, codes, scales, columns, num_columns, num_tiles, min_amax, POWER_OF_TWO, BLOCK_ROWS)


@triton.jit(do_not_specialize=["num_rows", "num_tiles", "min_amax"])  # type: ignore[untyped-decorator]
def requantize_columns_kernel(
    row_codes: tl.tensor,
    row_scales: tl.tensor,
    bounds: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    num_tiles: tl.tensor,
    row_codes_stride: tl.tensor,
    row_scales_stride: tl.tensor,
    min_amax: tl.tensor,
    POWER_OF_TWO: tl.constexpr,
    GROUPED: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
) -> None:
    """Quantizes BLOCK_COLUMNS columns, which share one scale per row, of one tile of FP8 rows."""
    row, in_rows = _rows_of(bounds, num_rows, GROUPED, BLOCK_ROWS)
    columns = _columns_of(VECTOR, BLOCK_COLUMNS)
    inside = in_rows[:, None] & (columns < num_columns)[None, :]
    code = tl.load(row_codes + row[:, None] * row_codes_stride + columns[None, :], mask=inside, other=0.0)
    column_tile = tl.program_id(0) // (BLOCK_ROWS // BLOCK_COLUMNS)  # tiles are square
    scale = tl.load(row_scales + row * row_scales_stride + column_tile, mask=in_rows, other=0.0)
    values = code.to(tl.float32) * scale[:, None]
    _store_columns(values, codes, scales, columns, num_columns, num_tiles, min_amax, POWER_OF_TWO, BLOCK_ROWS)


def quantize_columns(
    rows_ND: Tensor,
    counts: Sequence[int],
    *,
    power_of_two: bool,
    min_amax: float = 1e-4,
    block_columns: int = 64,
    vector: int = 4,
    num_warps: int = 8,
    by_rows: Quantized | None = None,
) -> QuantizedColumns:
    """Implements `reference.quantize_columns`; a thread loads `vector` adjacent columns.

    `by_rows`: memory for the codes by rows, with which `block_columns` must be 128.
    """
    check_min_amax(min_amax)
    check_numbers("quantize_columns: rows_ND", rows_ND, 2)
    num_rows, num_columns = rows_ND.shape
    check_counts("quantize_columns", counts, num_rows)
    quantized = _empty(rows_ND, counts)
    check_columns("quantize_columns", rows_ND=rows_ND)
    tiles = quantized.scales.shape[1]
    launch_kernel(
        quantize_columns_kernel,
        (rows_ND, _bounds(counts, rows_ND.device), *(by_rows or (None, None)), *quantized),
        (num_rows, num_columns, tiles),
        (TILE, block_columns),
        grid=(triton.cdiv(num_columns, block_columns), tiles),
        min_amax=float(min_amax),
        POWER_OF_TWO=power_of_two,
        GROUPED=len(counts) > 1,
        WITH_ROWS=by_rows is not None,
        VECTOR=vector,
        num_warps=num_warps,
    )
    return quantized


def quantize_both(
    rows_ND: Tensor,
    counts: Sequence[int],
    *,
    power_of_two: bool,
    min_amax: float = 1e-4,
    vector: int = 8,
    num_warps: int = 16,
) -> tuple[Quantized, QuantizedColumns]:
    """Implements `reference.quantize_both`; arguments as `quantize_columns`."""
    check_numbers("quantize_both: rows_ND", rows_ND, 2)
    rows = empty_quantized(rows_ND, *rows_ND.shape)
    options: dict[str, Any] = {"power_of_two": power_of_two, "min_amax": min_amax}
    columns = quantize_columns(
        rows_ND, counts, **options, block_columns=TILE, vector=vector, num_warps=num_warps, by_rows=rows
    )
    return rows, columns


def requantize_columns(
    quantized: Quantized,
    counts: Sequence[int],
    *,
    power_of_two: bool,
    min_amax: float = 1e-4,
    block_columns: int = 64,
    vector: int = 4,
    num_warps: int = 4,
) -> QuantizedColumns:
    """Implements `reference.requantize_columns`; arguments as `quantize_columns`."""
    check_min_amax(min_amax)
    check_quantized("requantize_columns", *quantized)
    codes_ND, scales_NT = quantized
    num_rows, num_columns = codes_ND.shape
    check_counts("requantize_columns", counts, num_rows)
    transposed = _empty(codes_ND, counts)
    check_columns("requantize_columns", codes=codes_ND, scales=scales_NT)
    tiles = transposed.scales.shape[1]
    launch_kernel(
        requantize_columns_kernel,
        (codes_ND, scales_NT, _bounds(counts, codes_ND.device), *transposed),
        (num_rows, num_columns, tiles),
        (TILE, block_columns),
        grid=(triton.cdiv(num_columns, block_columns), tiles),
        min_amax=float(min_amax),
        POWER_OF_TWO=power_of_two,
        GROUPED=len(counts) > 1,
        VECTOR=vector,
        num_warps=num_warps,
    )
    return transposed


def _empty(rows_ND: Tensor, counts: Sequence[int]) -> QuantizedColumns:
    num_columns = rows_ND.shape[1]
    num_padded = padded_rows(counts)
    return QuantizedColumns(
        rows_ND.new_empty(num_columns, num_padded, dtype=torch.float8_e4m3fn),
        rows_ND.new_empty(num_columns, num_padded // TILE, dtype=torch.float32),
    )


def _bounds(counts: Sequence[int], device: torch.device) -> Tensor | None:
    """Returns bounds_T2, int32: first row of each tile, end of its group; None for a single group."""
    if len(counts) <= 1:
        return None
    bounds = []
    first = 0
    for count in counts:
        bounds += [(first + TILE * tile, first + count) for tile in range(num_tiles(count))]
        first += count
    made_T2 = torch.tensor(bounds, dtype=torch.int32, pin_memory=device.type == "cuda")
    return made_T2.to(device, non_blocking=True)
