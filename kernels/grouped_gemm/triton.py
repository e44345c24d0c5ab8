"""Products of rows sorted by group with one matrix per group, in Triton; see reference.py.

One launch computes all groups: in a persistent grid, `programs_per_sm` programs per multiprocessor process tile after
tile of the result.

    kernel          tile of the result                           accumulator             rounding
    grouped_rows    block_rows x block_outputs, block_depth      float32 in registers    once, to nearest even, into
                    of K at a time                                                       the operands' type
    grouped_weight  block_outputs x block_inputs, block_depth    float32 in registers    likewise
                    rows of a group at a time

Float32 is multiplied in full precision, without tensor cores. Tiles of rows are ordered block by block. A block never
spans two groups, so a group's matrix is read from memory once. Tiles of operands are loaded by descriptor (TMA);
matrices whose rows do not begin at multiples of 16 bytes are copied first. Results are stored under masks, because a
tile at the end of a group overlaps the next group's rows, which other programs store. In a sum over rows, the next
group's rows are set to 0 on both sides, so that a NaN in them has no effect.
"""

# Shape legend: as there, and T tiles.

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from kernels.grouped_gemm.reference import check_rows, check_weight
from kernels.grouped_gemm.tiles import (
    GroupedTiling,
    choose_tiling,
    compute_depth_bounds,
    locate_matrix_tile,
    locate_row_tile,
    plan_row_tiles,
    store_tile,
)
from kernels.launch import allow_descriptors, count_programs, make_describable, resources


@triton.jit(do_not_specialize=["num_rows", "num_groups", "num_tiles"])  # type: ignore[untyped-decorator]
def grouped_rows_kernel(
    rows: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    places: tl.tensor,
    num_rows: tl.tensor,
    num_groups: tl.tensor,
    num_outputs: tl.tensor,
    depth: tl.tensor,
    num_tiles: tl.tensor,
    rows_stride: tl.tensor,
    weight_group_stride: tl.tensor,
    weight_stride: tl.tensor,
    ACROSS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    NUM_STAGES: tl.constexpr,
) -> None:
    """Computes tiles of each group's rows times its transposed matrix; ACROSS: it is stored transposed."""
    rows_tiles = tl.make_tensor_descriptor(rows, [num_rows, depth], [rows_stride, 1], [BLOCK_ROWS, BLOCK_DEPTH])
    if ACROSS:
        weight_tiles = tl.make_tensor_descriptor(
            weight,
            [num_groups, depth, num_outputs],
            [weight_group_stride, weight_stride, 1],
            [1, BLOCK_DEPTH, BLOCK_OUTPUTS],
        )
    else:
        weight_tiles = tl.make_tensor_descriptor(
            weight,
            [num_groups, num_outputs, depth],
            [weight_group_stride, weight_stride, 1],
            [1, BLOCK_OUTPUTS, BLOCK_DEPTH],
        )
    num_tile_columns = tl.cast(tl.cdiv(num_outputs, BLOCK_OUTPUTS), tl.int64)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        group, first_row, end, column = locate_row_tile(tile, places, num_tile_columns, BLOCK_ROWS)
        first_output = column * BLOCK_OUTPUTS
        total = tl.zeros((BLOCK_ROWS, BLOCK_OUTPUTS), tl.float32)
        for step in tl.range(0, tl.cdiv(depth, BLOCK_DEPTH), num_stages=NUM_STAGES):
            first = step * BLOCK_DEPTH
            left = rows_tiles.load([first_row, first])
            if ACROSS:
                right = weight_tiles.load([group, first, first_output]).reshape(BLOCK_DEPTH, BLOCK_OUTPUTS)
            else:
                right = weight_tiles.load([group, first_output, first]).reshape(BLOCK_OUTPUTS, BLOCK_DEPTH).T
            total = tl.dot(left, right, total, input_precision="ieee")
        row = first_row + tl.arange(0, BLOCK_ROWS)
        store_tile(out, total, row, end, first_output, num_outputs, BLOCK_ROWS, BLOCK_OUTPUTS, True)


@triton.jit(do_not_specialize=["num_rows", "num_tiles"])  # type: ignore[untyped-decorator]
def grouped_weight_kernel(
    grad: tl.tensor,
    rows: tl.tensor,
    out: tl.tensor,
    bounds: tl.tensor,
    num_rows: tl.tensor,
    num_outputs: tl.tensor,
    num_inputs: tl.tensor,
    num_tiles: tl.tensor,
    grad_stride: tl.tensor,
    rows_stride: tl.tensor,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    HEIGHT: tl.constexpr,
    NUM_STAGES: tl.constexpr,
) -> None:
    """Computes tiles of the gradients of all matrices, each summed over the rows of its group."""
    grad_tiles = tl.make_tensor_descriptor(
        grad, [num_rows, num_outputs], [grad_stride, 1], [BLOCK_DEPTH, BLOCK_OUTPUTS]
    )
    rows_tiles = tl.make_tensor_descriptor(rows, [num_rows, num_inputs], [rows_stride, 1], [BLOCK_DEPTH, BLOCK_INPUTS])
    num_tile_rows = tl.cast(tl.cdiv(num_outputs, BLOCK_OUTPUTS), tl.int64)
    num_tile_columns = tl.cast(tl.cdiv(num_inputs, BLOCK_INPUTS), tl.int64)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        group, tile_row, tile_column = locate_matrix_tile(tile, num_tile_rows, num_tile_columns, HEIGHT)
        first_output = tile_row * BLOCK_OUTPUTS
        first_input = tile_column * BLOCK_INPUTS
        begin = tl.load(bounds + group)
        end = tl.load(bounds + group + 1)
        num_steps = (end - begin) // BLOCK_DEPTH
        total = tl.zeros((BLOCK_OUTPUTS, BLOCK_INPUTS), tl.float32)
        for step in tl.range(0, num_steps, num_stages=NUM_STAGES):
            first = begin + step * BLOCK_DEPTH
            left = grad_tiles.load([first, first_output])
            right = rows_tiles.load([first, first_input])
            total = tl.dot(left.T, right, total, input_precision="ieee")
        first = begin + num_steps * BLOCK_DEPTH
        if first < end:
            inside = (first + tl.arange(0, BLOCK_DEPTH) < end)[:, None]
            left = grad_tiles.load([first, first_output])
            right = rows_tiles.load([first, first_input])
            left = tl.where(inside, left, 0.0)
            right = tl.where(inside, right, 0.0)
            total = tl.dot(left.T, right, total, input_precision="ieee")
        outputs = first_output + tl.arange(0, BLOCK_OUTPUTS)
        matrix = out + group.to(tl.int64) * num_outputs * num_inputs
        store_tile(matrix, total, outputs, num_outputs, first_input, num_inputs, BLOCK_OUTPUTS, BLOCK_INPUTS, True)


def grouped_rows(
    rows_AK: Tensor, weight_ENK: Tensor, counts: Sequence[int], *, tiling: GroupedTiling | None = None
) -> Tensor:
    """Implements `reference.grouped_rows`. A NaN or infinity in one group affects only its rows.

    Operands are bfloat16, float16 or float32, and copied unless rows begin at multiples of 16 bytes. Either dimension
    of `weight_ENK` may be the contiguous one. `tiling`: None chooses it by the type.
    """
    num_rows, num_groups, num_outputs, depth = check_rows("grouped_rows", rows_AK, weight_ENK, counts)
    tiling = tiling or choose_tiling("grouped_rows", rows_AK.dtype, num_outputs)
    out_AN = rows_AK.new_empty(num_rows, num_outputs)
    if out_AN.numel() == 0 or depth == 0:
        return out_AN.zero_()
    across = weight_ENK.stride(2) != 1 and weight_ENK.stride(1) == 1
    rows = make_describable(rows_AK)
    weight = make_describable(weight_ENK.transpose(1, 2) if across else weight_ENK)
    places_T5 = plan_row_tiles(counts, tiling.rows, tiling.height, out_AN.device)
    num_tiles = len(places_T5) * triton.cdiv(num_outputs, tiling.columns)
    allow_descriptors(out_AN.device)
    grouped_rows_kernel[(count_programs(num_tiles, tiling.programs_per_sm, out_AN.device),)](
        rows,
        weight,
        out_AN,
        places_T5,
        num_rows,
        num_groups,
        num_outputs,
        depth,
        num_tiles,
        rows.stride(0),
        weight.stride(0),
        weight.stride(1),
        ACROSS=across,
        BLOCK_ROWS=tiling.rows,
        BLOCK_OUTPUTS=tiling.columns,
        BLOCK_DEPTH=tiling.depth,
        **resources(tiling.warps, tiling.stages),
    )
    return out_AN


def grouped_weight(
    grad_AN: Tensor, rows_AK: Tensor, counts: Sequence[int], *, tiling: GroupedTiling | None = None
) -> Tensor:
    """Implements `reference.grouped_weight`; operands as in `grouped_rows`, rows of tiles are outputs."""
    num_rows, num_groups, num_outputs, num_inputs = check_weight("grouped_weight", grad_AN, rows_AK, counts)
    tiling = tiling or choose_tiling("grouped_weight", grad_AN.dtype, num_inputs)
    out_ENK = grad_AN.new_empty(num_groups, num_outputs, num_inputs)
    if out_ENK.numel() == 0 or num_rows == 0:
        return out_ENK.zero_()
    grad = make_describable(grad_AN)
    rows = make_describable(rows_AK)
    num_tiles = num_groups * triton.cdiv(num_outputs, tiling.rows) * triton.cdiv(num_inputs, tiling.columns)
    allow_descriptors(out_ENK.device)
    grouped_weight_kernel[(count_programs(num_tiles, tiling.programs_per_sm, out_ENK.device),)](
        grad,
        rows,
        out_ENK,
        compute_depth_bounds(counts, out_ENK.device),
        num_rows,
        num_outputs,
        num_inputs,
        num_tiles,
        grad.stride(0),
        rows.stride(0),
        BLOCK_OUTPUTS=tiling.rows,
        BLOCK_INPUTS=tiling.columns,
        BLOCK_DEPTH=tiling.depth,
        HEIGHT=tiling.height,
        **resources(tiling.warps, tiling.stages),
    )
    return out_ENK
