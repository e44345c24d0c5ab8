"""Products of FP8 codes and scales, also grouped, in Triton; see kernels/gemm/reference.py.

One launch computes all groups: in a persistent grid, `programs_per_sm` programs per multiprocessor process tile after
tile of the result.

    kernel              tile of the result          accumulator                            rounding
    gemm                rows x outputs, 128 of K    per 128 of K float32, of which the     once, to nearest even, into
                        at a time                   tensor cores keep 14 bits or so;       the result's dtype
    grouped_rows_fp8    block_rows x block_outputs, these are scaled and added in float32  likewise
                        128 of K at a time          registers (arXiv:2412.19437, section
    grouped_weight_fp8  block_outputs x             3.3.2)                                 none, float32
                        block_inputs, 128 rows of
                        a group at a time

A multiprocessor's registers hold two sums: that of the tensor cores, and the float32 sum to which it is added after
every 128 of K ("increasing accumulation precision" in section 3.3.2). This limits tiles to 128 x 128. If one of the two
scales covers the whole tile, the scales are multiplied first, which leaves one fused operation per number; underflow of
that product below 2^-126 changes a result by less than 2^-124 for every 128 of K. With `specialize`, one group of warps
loads and two groups multiply, each one half of the rows of a tile: while one adds to its sum, the products of the other
keep the tensor cores busy.

`gemm` processes tiles in groups of `group` tile rows, so that concurrent programs share operands in the cache. Tiles of
the operands are loaded by descriptor (TMA). This requires rows at multiples of 16 bytes; other codes are copied first,
because masked loads of single bytes would cost far more. Tiles of its result are stored by descriptor if rows are
aligned, else under a mask. Values beyond the last row, output or number of K are read as 0.

Tiles of groups are ordered and stored as in `triton_tiles.py`; a descriptor cannot store a tile at the end of a group.
Values of another group never enter a sum.
"""

# Shape legend: as in the reference, and T tiles.

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gemm.reference import check_columns, check_rows_by_blocks, check_rows_fp8, check_weight_fp8
from kernels.gemm.triton_tiles import (
    compute_depth_bounds,
    is_stored_at_once,
    locate_matrix_tile,
    locate_row_tile,
    plan_row_tiles,
    store_tile,
)
from kernels.launch import (
    LARGEST_DESCRIBED_BYTES,
    OF_COLUMNS,
    STORED_BY_DESCRIPTOR,
    STORED_BY_MASK,
    Tiling,
    is_describable,
    launch_tiles,
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
        # Scales of the tile: one for each row on the left, and on the right one for the tile or one for each output.
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
    # Results that are unaligned or wider than 4 bytes are stored under a mask, with a smaller tile.
    store_by_descriptor = is_describable(out_MN) and out_MN.element_size() <= LARGEST_DESCRIBED_BYTES
    by_blocks = isinstance(right, QuantizedBlocks)
    stored_whole = STORED_BY_DESCRIPTOR if by_blocks else OF_COLUMNS
    tiling = tiling or (stored_whole if store_by_descriptor else STORED_BY_MASK)
    num_tiles = triton.cdiv(num_rows, tiling.rows) * triton.cdiv(num_outputs, tiling.outputs)
    launch_tiles(
        gemm_kernel,
        (*_operands(left, right), out_MN),
        (num_rows, num_outputs, depth, num_tiles),
        tiling,
        BY_BLOCKS=by_blocks,
        STORE_BY_DESCRIPTOR=store_by_descriptor,
        BLOCK_ROWS=tiling.rows,
        BLOCK_OUTPUTS=tiling.outputs,
        BLOCK_DEPTH=TILE,
        GROUP=tiling.group,
    )


def _operands(
    left: Quantized | QuantizedColumns, right: QuantizedBlocks | QuantizedColumns
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns describable codes of both and scales with contiguous rows; copies if they are not."""
    codes = make_describable(left.codes), make_describable(right.codes)
    return *codes, make_rows_contiguous(left.scales), make_rows_contiguous(right.scales)


OF_ROWS = Tiling()
# Groups are only a few tiles of 128 rows deep, and float32 results are large, so one program should store while others
# load.
WEIGHT_TILING = Tiling(outputs=64, warps=4, stages=3, programs_per_sm=2)


@triton.jit(do_not_specialize=["num_rows", "num_groups", "depth", "num_tiles"])  # type: ignore[untyped-decorator]
def grouped_rows_fp8_kernel(
    rows: tl.tensor,
    weights: tl.tensor,
    rows_scales: tl.tensor,
    weights_scales: tl.tensor,
    out: tl.tensor,
    places: tl.tensor,
    num_rows: tl.tensor,
    num_groups: tl.tensor,
    num_outputs: tl.tensor,
    depth: tl.tensor,
    num_tiles: tl.tensor,
    rows_stride: tl.tensor,
    weights_group_stride: tl.tensor,
    weights_stride: tl.tensor,
    rows_scales_stride: tl.tensor,
    SPECIALIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    NUM_STAGES: tl.constexpr,
) -> None:
    """Computes tiles of each group's rows times the transpose of its matrix."""
    rows_tiles = tl.make_tensor_descriptor(rows, [num_rows, depth], [rows_stride, 1], [BLOCK_ROWS, BLOCK_DEPTH])
    weights_tiles = tl.make_tensor_descriptor(
        weights,
        [num_groups, num_outputs, depth],
        [weights_group_stride, weights_stride, 1],
        [1, BLOCK_OUTPUTS, BLOCK_DEPTH],
    )
    num_tile_columns = tl.cast(tl.cdiv(num_outputs, BLOCK_OUTPUTS), tl.int64)
    scales_rows = tl.cast(tl.cdiv(num_outputs, BLOCK_DEPTH), tl.int64)  # a block is as high as it is wide
    scales_columns = tl.cdiv(depth, BLOCK_DEPTH)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), warp_specialize=SPECIALIZE):
        group, first_row, end, column = locate_row_tile(tile, places, num_tile_columns, BLOCK_ROWS)
        first_output = column * BLOCK_OUTPUTS
        row = first_row + tl.arange(0, BLOCK_ROWS)
        # One scale for each row and 128 of K; one for all outputs of the tile, as it is at most 128 wide.
        row_scales = rows_scales + row.to(tl.int64) * rows_scales_stride
        block_scales = weights_scales + (group * scales_rows + first_output // BLOCK_DEPTH) * scales_columns
        total = tl.zeros((BLOCK_ROWS, BLOCK_OUTPUTS), tl.float32)
        for step in tl.range(0, scales_columns, num_stages=NUM_STAGES):
            first = step * BLOCK_DEPTH
            row_scale = tl.load(row_scales + step, mask=row < end, other=0.0)
            block_scale = tl.load(block_scales + step)
            row_codes = rows_tiles.load([first_row, first])
            weight_codes = weights_tiles.load([group, first_output, first]).reshape(BLOCK_OUTPUTS, BLOCK_DEPTH)
            total += tl.dot(row_codes, weight_codes.T) * (row_scale * block_scale)[:, None]
        store_tile(out, total, row, end, first_output, num_outputs, BLOCK_ROWS, BLOCK_OUTPUTS, not SPECIALIZE)


@triton.jit(do_not_specialize=["num_tiles"])  # type: ignore[untyped-decorator]
def grouped_weight_fp8_kernel(
    grad: tl.tensor,
    rows: tl.tensor,
    grad_scales: tl.tensor,
    rows_scales: tl.tensor,
    out: tl.tensor,
    bounds: tl.tensor,
    num_outputs: tl.tensor,
    num_inputs: tl.tensor,
    depth: tl.tensor,
    num_tiles: tl.tensor,
    grad_stride: tl.tensor,
    rows_stride: tl.tensor,
    grad_scales_stride: tl.tensor,
    rows_scales_stride: tl.tensor,
    SPECIALIZE: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    HEIGHT: tl.constexpr,
    NUM_STAGES: tl.constexpr,
) -> None:
    """Computes tiles of the gradients of all matrices, each summed over the tiles of its group."""
    grad_tiles = tl.make_tensor_descriptor(grad, [num_outputs, depth], [grad_stride, 1], [BLOCK_OUTPUTS, BLOCK_DEPTH])
    rows_tiles = tl.make_tensor_descriptor(rows, [num_inputs, depth], [rows_stride, 1], [BLOCK_INPUTS, BLOCK_DEPTH])
    num_tile_rows = tl.cast(tl.cdiv(num_outputs, BLOCK_OUTPUTS), tl.int64)
    num_tile_columns = tl.cast(tl.cdiv(num_inputs, BLOCK_INPUTS), tl.int64)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), warp_specialize=SPECIALIZE):
        group, tile_row, tile_column = locate_matrix_tile(tile, num_tile_rows, num_tile_columns, HEIGHT)
        first_output = tile_row * BLOCK_OUTPUTS
        first_input = tile_column * BLOCK_INPUTS
        outputs = first_output + tl.arange(0, BLOCK_OUTPUTS)
        inputs = first_input + tl.arange(0, BLOCK_INPUTS)
        # Both operands have a scale for each of their rows and 128 of K.
        output_scales = grad_scales + outputs.to(tl.int64) * grad_scales_stride
        input_scales = rows_scales + inputs.to(tl.int64) * rows_scales_stride
        total = tl.zeros((BLOCK_OUTPUTS, BLOCK_INPUTS), tl.float32)
        # A group's rows are whole tiles of 128, so the steps are those of its tiles.
        for step in tl.range(tl.load(bounds + group), tl.load(bounds + group + 1), num_stages=NUM_STAGES):
            first = step * BLOCK_DEPTH
            output_scale = tl.load(output_scales + step, mask=outputs < num_outputs, other=0.0)
            input_scale = tl.load(input_scales + step, mask=inputs < num_inputs, other=0.0)
            grad_codes = grad_tiles.load([first_output, first])
            row_codes = rows_tiles.load([first_input, first])
            total += tl.dot(grad_codes, row_codes.T) * output_scale[:, None] * input_scale[None, :]
        matrix = out + group.to(tl.int64) * num_outputs * num_inputs
        in_halves: tl.constexpr = not SPECIALIZE
        store_tile(matrix, total, outputs, num_outputs, first_input, num_inputs, BLOCK_OUTPUTS, BLOCK_INPUTS, in_halves)


def grouped_rows_fp8(
    rows: Quantized,
    weights: QuantizedBlocks,
    counts: Sequence[int],
    dtype: torch.dtype,
    *,
    tiling: Tiling | None = None,
) -> Tensor:
    """Implements `reference.grouped_rows_fp8`. A NaN in one group affects only its rows."""
    num_rows, num_groups, num_outputs, depth = check_rows_fp8("grouped_rows_fp8", rows, weights, counts)
    out_AN = rows.codes.new_empty(num_rows, num_outputs, dtype=dtype)
    if out_AN.numel() == 0 or depth == 0:
        return out_AN.zero_()
    tiling = tiling or (OF_ROWS if is_stored_at_once(num_outputs) else STORED_BY_MASK)
    rows_AK = make_describable(rows.codes)
    weights_ENK = make_describable(weights.codes)
    rows_scales = make_rows_contiguous(rows.scales)
    places_T5 = plan_row_tiles(counts, tiling.rows, tiling.group, out_AN.device)
    num_tiles = len(places_T5) * triton.cdiv(num_outputs, tiling.outputs)
    launch_tiles(
        grouped_rows_fp8_kernel,
        (rows_AK, weights_ENK, rows_scales, weights.scales.contiguous(), out_AN, places_T5),
        (num_rows, num_groups, num_outputs, depth, num_tiles),
        tiling,
        weights_group_stride=weights_ENK.stride(0),
        weights_stride=weights_ENK.stride(1),
        BLOCK_ROWS=tiling.rows,
        BLOCK_OUTPUTS=tiling.outputs,
        BLOCK_DEPTH=TILE,
    )
    return out_AN


def grouped_weight_fp8(
    grad: QuantizedColumns, rows: QuantizedColumns, counts: Sequence[int], *, tiling: Tiling = WEIGHT_TILING
) -> Tensor:
    """Implements `reference.grouped_weight_fp8`; the tiling's rows are outputs, its outputs inputs."""
    depth, num_groups, num_outputs, num_inputs = check_weight_fp8("grouped_weight_fp8", grad, rows, counts)
    out_ENK = grad.codes.new_empty(num_groups, num_outputs, num_inputs, dtype=torch.float32)
    if out_ENK.numel() == 0 or depth == 0:
        return out_ENK.zero_()
    num_tiles = num_groups * triton.cdiv(num_outputs, tiling.rows) * triton.cdiv(num_inputs, tiling.outputs)
    bounds = compute_depth_bounds([triton.cdiv(count, TILE) for count in counts], out_ENK.device)
    launch_tiles(
        grouped_weight_fp8_kernel,
        (*_operands(grad, rows), out_ENK, bounds),
        (num_outputs, num_inputs, depth, num_tiles),
        tiling,
        BLOCK_OUTPUTS=tiling.rows,
        BLOCK_INPUTS=tiling.outputs,
        BLOCK_DEPTH=TILE,
        HEIGHT=tiling.group,
    )
    return out_ENK
