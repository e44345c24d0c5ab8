"""Products of matrices in FP8 codes and scales, in Triton.

    kernel  grid                            tile                     accumulator                     rounding
    gemm    persistent: programs_per_sm     rows x outputs,          per 128 of K float32, of which  once, to nearest
            programs per multiprocessor,    128 of K at a time       the tensor cores keep 14 bits   even, into the
            a tile of the result after                               or so; these are scaled and     result's dtype
            the other each                                           added in float32 registers

A multiprocessor's registers hold two sums: that of the tensor cores, and the float32 sum to which it is added after
every 128 of K (arXiv:2412.19437, section 3.3.2, "increasing accumulation precision"). This limits tiles to 128 x 128.
If one of the two scales covers the whole tile, the scales are multiplied first, which leaves one fused operation per
number; underflow of that product below 2^-126 changes a result by less than 2^-124 for every 128 of K. With
`specialize`, one group of warps loads and two groups multiply, each one half of the rows of a tile: while one adds to
its sum, the products of the other keep the tensor cores busy.

Tiles are processed in groups of `group` tile rows, so that concurrent programs share operands in the cache. Tiles of
the operands are loaded by descriptor (TMA). This requires rows at multiples of 16 bytes; other codes are copied first,
because masked loads of single bytes would cost far more. Tiles of the result are stored by descriptor if its rows are
aligned, else under a mask. Values beyond the last row, output or number of K are read as 0.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.grouped_gemm.reference import check_columns, check_rows_by_blocks
from kernels.launch import (
    LARGEST_DESCRIBED_BYTES,
    OF_COLUMNS,
    STORED_BY_DESCRIPTOR,
    STORED_BY_MASK,
    Tiling,
    allow_descriptors,
    count_programs,
    is_describable,
    make_describable,
    make_rows_contiguous,
)
from kernels.quantize.layout import TILE, Quantized, QuantizedBlocks, QuantizedColumns


@triton.jit  # type: ignore[untyped-decorator]
def locate_tile(
    tile: tl.tensor, num_tile_rows: tl.tensor, num_tile_columns: tl.tensor, GROUP: tl.constexpr
) -> tl.tensor:
    """Returns row and column of a tile: down GROUP rows, then the next column, then the next GROUP rows."""
    tiles_of_group = GROUP * num_tile_columns
    first_row = tile // tiles_of_group * GROUP
    num_rows = tl.minimum(num_tile_rows - first_row, GROUP)
    in_group = tile % tiles_of_group
    return (first_row + in_group % num_rows).to(tl.int32), (in_group // num_rows).to(tl.int32)


@triton.jit(do_not_specialize=["num_rows", "num_outputs", "depth", "num_tiles"])  # type: ignore[untyped-decorator]
def gemm_kernel(
    left: tl.tensor,
    right: tl.tensor,
    left_scales: tl.tensor,
    right_scales: tl.tensor,
    out: tl.tensor,
    num_rows: tl.tensor,
    num_outputs: tl.tensor,
    depth: tl.tensor,
    num_tiles: tl.tensor,
    left_stride: tl.tensor,
    right_stride: tl.tensor,
    left_scales_stride: tl.tensor,
    right_scales_stride: tl.tensor,
    BY_BLOCKS: tl.constexpr,
    STORE_BY_DESCRIPTOR: tl.constexpr,
    SPECIALIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_STAGES: tl.constexpr,
) -> None:
    """Computes tiles of `left right^T`; BY_BLOCKS: a scale of `right` covers 128 of its rows, not one."""
    left_tiles = tl.make_tensor_descriptor(left, [num_rows, depth], [left_stride, 1], [BLOCK_ROWS, BLOCK_DEPTH])
    right_tiles = tl.make_tensor_descriptor(
        right, [num_outputs, depth], [right_stride, 1], [BLOCK_OUTPUTS, BLOCK_DEPTH]
    )
    if STORE_BY_DESCRIPTOR:
        out_tiles = tl.make_tensor_descriptor(
            out, [num_rows, num_outputs], [num_outputs, 1], [BLOCK_ROWS, BLOCK_OUTPUTS]
        )
    num_tile_rows = tl.cast(tl.cdiv(num_rows, BLOCK_ROWS), tl.int64)
    num_tile_columns = tl.cast(tl.cdiv(num_outputs, BLOCK_OUTPUTS), tl.int64)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), warp_specialize=SPECIALIZE):
        tile_row, tile_column = locate_tile(tile, num_tile_rows, num_tile_columns, GROUP)
        first_row = tile_row * BLOCK_ROWS
        first_output = tile_column * BLOCK_OUTPUTS
        rows = first_row + tl.arange(0, BLOCK_ROWS)
        outputs = first_output + tl.arange(0, BLOCK_OUTPUTS)
        left_scale_rows = left_scales + rows.to(tl.int64) * left_scales_stride
        if BY_BLOCKS:
            right_scale_rows = right_scales + (first_output // BLOCK_DEPTH).to(tl.int64) * right_scales_stride
        else:
            right_scale_rows = right_scales + outputs.to(tl.int64) * right_scales_stride
        total = tl.zeros((BLOCK_ROWS, BLOCK_OUTPUTS), tl.float32)
        for step in tl.range(0, tl.cdiv(depth, BLOCK_DEPTH), num_stages=NUM_STAGES):
            first = step * BLOCK_DEPTH
            left_scale = tl.load(left_scale_rows + step, mask=rows < num_rows, other=0.0)
            if BY_BLOCKS:
                right_scale = tl.load(right_scale_rows + step)
            else:
                right_scale = tl.load(right_scale_rows + step, mask=outputs < num_outputs, other=0.0)
            left_codes = left_tiles.load([first_row, first])
            right_codes = right_tiles.load([first_output, first])
            if BY_BLOCKS:
                total += tl.dot(left_codes, right_codes.T) * (left_scale * right_scale)[:, None]
            else:
                total += tl.dot(left_codes, right_codes.T) * left_scale[:, None] * right_scale[None, :]
        result = total.to(out.dtype.element_ty)
        if STORE_BY_DESCRIPTOR:
            out_tiles.store([first_row, first_output], result)
        else:
            inside = (rows < num_rows)[:, None] & (outputs < num_outputs)[None, :]
            tl.store(out + rows.to(tl.int64)[:, None] * num_outputs + outputs[None, :], result, mask=inside)


def gemm_fp8(left: Quantized, right: QuantizedBlocks, dtype: torch.dtype, *, tiling: Tiling | None = None) -> Tensor:
    """Implements `reference.gemm_fp8`; codes are copied unless rows begin at multiples of 16 bytes."""
    num_rows, num_outputs, _ = check_rows_by_blocks("gemm_fp8", left, right)
    out_MN = left.codes.new_empty(num_rows, num_outputs, dtype=dtype)
    _launch(left, right, out_MN, tiling)
    return out_MN


def gemm_fp8_columns(left: QuantizedColumns, right: QuantizedColumns, *, tiling: Tiling | None = None) -> Tensor:
    """Implements `reference.gemm_fp8_columns`; codes are copied as in `gemm_fp8`."""
    num_rows, num_outputs, _ = check_columns("gemm_fp8_columns", left, right)
    out_MN = left.scales.new_empty(num_rows, num_outputs)
    _launch(left, right, out_MN, tiling)
    return out_MN


def _launch(
    left: Quantized | QuantizedColumns,
    right: QuantizedBlocks | QuantizedColumns,
    out_MN: Tensor,
    tiling: Tiling | None,
) -> None:
    num_rows, num_outputs = out_MN.shape
    depth = left.codes.shape[1]
    if out_MN.numel() == 0 or depth == 0:
        out_MN.zero_()
        return
    left_MK = make_describable(left.codes)
    right_NK = make_describable(right.codes)
    left_scales, right_scales = (make_rows_contiguous(scales) for scales in (left.scales, right.scales))
    store_by_descriptor = is_describable(out_MN) and out_MN.element_size() <= LARGEST_DESCRIBED_BYTES
    by_blocks = isinstance(right, QuantizedBlocks)
    stored_whole = STORED_BY_DESCRIPTOR if by_blocks else OF_COLUMNS
    tiling = tiling or (stored_whole if store_by_descriptor else STORED_BY_MASK)
    num_tiles = triton.cdiv(num_rows, tiling.rows) * triton.cdiv(num_outputs, tiling.outputs)
    allow_descriptors(out_MN.device)
    gemm_kernel[(count_programs(num_tiles, tiling.programs_per_sm, out_MN.device),)](
        left_MK,
        right_NK,
        left_scales,
        right_scales,
        out_MN,
        num_rows,
        num_outputs,
        depth,
        num_tiles,
        left_MK.stride(0),
        right_NK.stride(0),
        left_scales.stride(0),
        right_scales.stride(0),
        BY_BLOCKS=by_blocks,
        STORE_BY_DESCRIPTOR=store_by_descriptor,
        BLOCK_ROWS=tiling.rows,
        BLOCK_OUTPUTS=tiling.outputs,
        BLOCK_DEPTH=TILE,
        GROUP=tiling.group,
        **tiling.resources,
    )
