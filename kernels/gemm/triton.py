"""Products of rows sorted by group with one matrix per group, in Triton; see reference.py.

One launch computes all groups: in a persistent grid, `programs_per_sm` programs per multiprocessor process tile after
tile of the result.

    kernel          tile of the result                           accumulator             rounding
    grouped_rows    block_rows x block_outputs, block_depth      float32 in registers    once, to nearest even, into
                    of K at a time                                                       the operands' type
    grouped_weight  block_outputs x block_inputs, block_depth    float32 in registers    likewise
                    rows of a group at a time

Float32 is multiplied in full precision, without tensor cores. Groups have any number of rows. A tile of rows begins at
the start of its group or a whole number of tiles after it, so it may overlap the next group; those rows are computed
but not stored. Tile positions are computed on the host from the counts and copied asynchronously. Tiles of rows are
ordered block by block. A block never spans two groups, so a group's matrix is read from memory once.

Tiles of operands are loaded by descriptor (TMA); matrices whose rows do not begin at multiples of 16 bytes are copied
first. Results are stored under masks, because a tile at the end of a group overlaps the next group's rows, which other
programs store. In a sum over rows, the next group's rows are set to 0 on both sides, so that a NaN in them has no
effect.
"""

# Shape legend: as there, and T tiles of rows in all groups.

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gemm.reference import check_rows, check_weight
from kernels.launch import allow_descriptors, check_sides, count_programs, make_describable, resources

PLACES = tl.constexpr(5)
KNOWN_MULTIPLE = 16  # Triton specializes kernels for multiples of this number only
LARGEST_SIDE = 256
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupedTiling:
    """Tile sizes of the result, and the resources of a program."""

    rows: int = 128  # rows per tile, a power of two; at least 64 for `wgmma` instructions
    columns: int = 256  # columns per tile, a power of two
    depth: int = 64  # numbers that are multiplied and added at a time, a power of two
    height: int = 8  # tile rows that are processed together, column by column
    programs_per_sm: int = 1  # programs that run at the same time on a multiprocessor
    warps: int = 8  # warps per program
    stages: int = 3  # tiles of the operands in shared memory, in flight or in use

    def __post_init__(self) -> None:
        """Raises ValueError if a side is not a power of two in [16, 256]."""
        check_sides("GroupedTiling", LARGEST_SIDE, rows=self.rows, columns=self.columns, depth=self.depth)


OF_16_BITS = GroupedTiling()
# Unaligned stores take registers for their addresses: a smaller tile avoids spills.
OF_16_BITS_ONE_BY_ONE = GroupedTiling(columns=128, stages=4)
# Full float32 does not use tensor cores: sums and operands share the registers.
OF_32_BITS = GroupedTiling(rows=64, columns=64, depth=32, programs_per_sm=2)


def is_stored_at_once(num_columns: int) -> bool:
    """Whether all rows of so many columns begin at multiples of 16 bytes, the size of a vector store."""
    return num_columns % KNOWN_MULTIPLE == 0


def choose_tiling(subject: str, dtype: torch.dtype, num_columns: int) -> GroupedTiling:
    """Returns the tiling for a result; raises ValueError if no kernel supports the type of the operands."""
    if dtype not in DTYPES:
        valid = ", ".join(str(valid_dtype).removeprefix("torch.") for valid_dtype in DTYPES)
        raise ValueError(f"{subject}: the type must be one of {valid}, got {dtype}; nearest: float32")
    if dtype == torch.float32:
        return OF_32_BITS
    return OF_16_BITS if is_stored_at_once(num_columns) else OF_16_BITS_ONE_BY_ONE


@triton.jit  # type: ignore[untyped-decorator]
def locate_row_tile(
    tile: tl.tensor, places: tl.tensor, num_tile_columns: tl.tensor, BLOCK_ROWS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Returns group, first row, end of the group's rows, and column of a tile; a block shares a matrix."""
    # Every tile row of the block stores the start of the block.
    row_tile = places + tile // num_tile_columns * PLACES
    first_tile_row = tl.load(row_tile).to(tl.int64)
    height = tl.load(row_tile + 1).to(tl.int64)
    first_row = tl.load(row_tile + 2)
    end = tl.load(row_tile + 3)
    group = tl.load(row_tile + 4)
    # Within a block, tiles go down its rows first, so that they share the columns of the matrix.
    in_block = tile - first_tile_row * num_tile_columns
    row = first_row + (in_block % height).to(tl.int32) * BLOCK_ROWS
    return group, row, end, (in_block // height).to(tl.int32)


@triton.jit  # type: ignore[untyped-decorator]
def locate_matrix_tile(
    tile: tl.tensor, num_tile_rows: tl.tensor, num_tile_columns: tl.tensor, HEIGHT: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Returns group, row and column of a tile of matrices; within one, down HEIGHT rows by column."""
    tiles_of_matrix = num_tile_rows * num_tile_columns
    # Tiles of a matrix in blocks of HEIGHT rows: down a block, then to the next column.
    in_matrix = tile % tiles_of_matrix
    tiles_of_block = HEIGHT * num_tile_columns
    first_row = in_matrix // tiles_of_block * HEIGHT
    height = tl.minimum(num_tile_rows - first_row, HEIGHT)
    in_block = in_matrix % tiles_of_block
    row = first_row + in_block % height
    column = in_block // height
    return (tile // tiles_of_matrix).to(tl.int32), row.to(tl.int32), column.to(tl.int32)


@triton.jit  # type: ignore[untyped-decorator]
def store_tile(
    out: tl.tensor,
    total: tl.tensor,
    rows: tl.tensor,
    end: tl.tensor,
    first_column: tl.tensor,
    num_columns: tl.tensor,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    IN_HALVES: tl.constexpr,
) -> None:
    """Rounds and stores rows before `end`, and columns before the last.

    IN_HALVES stores the left half of the columns, then the right half, with fewer registers for addresses. Triton 3.6
    cannot split a tile in a loop with `specialize`, in which each warp has registers for a whole tile.
    """
    row_starts = out + rows.to(tl.int64)[:, None] * num_columns
    inside = (rows < end)[:, None]
    if not IN_HALVES:
        columns = first_column + tl.arange(0, BLOCK_COLUMNS)
        tl.store(
            row_starts + columns[None, :], total.to(out.dtype.element_ty), inside & (columns < num_columns)[None, :]
        )
        return
    # Left and right half of the columns as the last axis, which `split` takes apart.
    halves = total.reshape(BLOCK_ROWS, 2, BLOCK_COLUMNS // 2).permute(0, 2, 1)
    left, right = tl.split(halves)
    columns = first_column + tl.arange(0, BLOCK_COLUMNS // 2)
    tl.store(row_starts + columns[None, :], left.to(out.dtype.element_ty), inside & (columns < num_columns)[None, :])
    columns += BLOCK_COLUMNS // 2
    tl.store(row_starts + columns[None, :], right.to(out.dtype.element_ty), inside & (columns < num_columns)[None, :])


def plan_row_tiles(counts: Sequence[int], block_rows: int, height: int, device: torch.device) -> Tensor:
    """Returns places_T5, int32, for `locate_row_tile`: tiles of rows in blocks, column by column.

    The five values describe the tile's block: its first tile, its number of tiles, its first row, the end of its
    group's rows, and its group. A block has at most `height` tiles and never spans two groups.
    """
    places: list[tuple[int, ...]] = []
    first_row = 0
    for group, count in enumerate(counts):
        # Tiles that are left of this group, the next row, and the end of its rows.
        left = triton.cdiv(count, block_rows)
        row = first_row
        end = first_row + count
        while left:
            tiles = min(height, left)
            places += [(len(places), tiles, row, end, group)] * tiles
            left = left - tiles
            row = row + tiles * block_rows
        first_row = end
    return copy_to_device(places, device)


def compute_depth_bounds(sizes: Sequence[int], device: torch.device) -> Tensor:
    """Returns the start of each group's sum and the end of the last one: E + 1 numbers, int32."""
    return copy_to_device(list(accumulate(sizes, initial=0)), device)


def copy_to_device(numbers: Sequence[int] | Sequence[tuple[int, ...]], device: torch.device) -> Tensor:
    """Returns host integers as int32 on the device, copied asynchronously."""
    host_numbers = torch.tensor(numbers, dtype=torch.int32, pin_memory=device.type == "cuda")
    return host_numbers.to(device, non_blocking=True)


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
    # Tiles beyond 2**31 need int64 indices.
    num_tile_columns = tl.cast(tl.cdiv(num_outputs, BLOCK_OUTPUTS), tl.int64)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        group, first_row, end, column = locate_row_tile(tile, places, num_tile_columns, BLOCK_ROWS)
        first_output = column * BLOCK_OUTPUTS
        # Sum over K in float32; rows of the next group are computed too, but not stored.
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
        # The rows of this group, in whole steps and a last partial one.
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
            # The rest of the last step belongs to the next group: a NaN there times 0 would be NaN, so both sides are
            # 0.
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
    # A transposed matrix, as in a backward, is read as it lies in memory instead of copied.
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
