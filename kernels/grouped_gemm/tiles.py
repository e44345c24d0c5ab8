"""Maps programs to tiles of a grouped product and stores tiles; shared by the kernels of this folder.

Groups have any number of rows. A tile of rows begins at the start of its group or a whole number of tiles after it, so
it may overlap the next group; those rows are computed but not stored. Tile positions are computed on the host from the
counts and copied asynchronously.

Shape legend: T tiles of rows in all groups, E groups.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gemm_fp8.descriptors import ALIGNMENT_BYTES, is_describable
from kernels.quantize.layout import num_tiles

PLACES = tl.constexpr(5)


@triton.jit  # type: ignore[untyped-decorator]
def locate_row_tile(
    tile: tl.tensor, places: tl.tensor, num_tile_columns: tl.tensor, BLOCK_ROWS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Returns group, first row, end of the group's rows, and column of a tile, from `plan_row_tiles`.

    The order is down a block of tile rows, then the next column, so that concurrent programs share a group's matrix.
    """
    # Every tile row of the block stores the start of the block.
    place = places + tile // num_tile_columns * PLACES
    first_tile_row, height = tl.load(place).to(tl.int64), tl.load(place + 1).to(tl.int64)
    first_row, end, group = tl.load(place + 2), tl.load(place + 3), tl.load(place + 4)
    in_block = tile - first_tile_row * num_tile_columns
    row = first_row + (in_block % height).to(tl.int32) * BLOCK_ROWS
    return group, row, end, (in_block // height).to(tl.int32)


@triton.jit  # type: ignore[untyped-decorator]
def locate_matrix_tile(
    tile: tl.tensor, num_tile_rows: tl.tensor, num_tile_columns: tl.tensor, HEIGHT: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Returns group, row and column of a tile of matrices; within one, down HEIGHT rows by column."""
    tiles_of_matrix = num_tile_rows * num_tile_columns
    in_matrix = tile % tiles_of_matrix
    tiles_of_block = HEIGHT * num_tile_columns
    first_row = in_matrix // tiles_of_block * HEIGHT
    height = tl.minimum(num_tile_rows - first_row, HEIGHT)
    in_block = in_matrix % tiles_of_block
    row, column = first_row + in_block % height, in_block // height
    return (tile // tiles_of_matrix).to(tl.int32), row.to(tl.int32), column.to(tl.int32)


@triton.jit  # type: ignore[untyped-decorator]
def store_tile(  # noqa: PLR0913
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

    IN_HALVES stores the left half of the columns, then the right half: addresses of a whole tile would take more
    registers than its sums leave. Triton 3.6 cannot split a tile in a loop with `specialize`, in which each warp has
    registers for a whole tile.
    """
    row_starts = out + rows.to(tl.int64)[:, None] * num_columns
    inside = (rows < end)[:, None]
    if not IN_HALVES:
        columns = first_column + tl.arange(0, BLOCK_COLUMNS)
        tl.store(
            row_starts + columns[None, :], total.to(out.dtype.element_ty), inside & (columns < num_columns)[None, :]
        )
        return
    halves = total.reshape(BLOCK_ROWS, 2, BLOCK_COLUMNS // 2).permute(0, 2, 1)
    left, right = tl.split(halves)
    columns = first_column + tl.arange(0, BLOCK_COLUMNS // 2)
    tl.store(row_starts + columns[None, :], left.to(out.dtype.element_ty), inside & (columns < num_columns)[None, :])
    columns += BLOCK_COLUMNS // 2
    tl.store(row_starts + columns[None, :], right.to(out.dtype.element_ty), inside & (columns < num_columns)[None, :])


def plan_row_tiles(counts: Sequence[int], block_rows: int, height: int, device: torch.device) -> Tensor:
    """Returns places_T5, int32, for `locate_row_tile`: tiles of rows in blocks, column by column.

    The five values describe the tile's block: its first tile, its number of tiles, its first row, the end of its
    group's rows, and its group.

    Args:
        height: largest number of tiles in a block; a block never spans two groups.
        device: to copy to, asynchronously.
    """
    places: list[tuple[int, ...]] = []
    first_row = 0
    for group, count in enumerate(counts):
        left, row, end = triton.cdiv(count, block_rows), first_row, first_row + count
        while left:
            tiles = min(height, left)
            places += [(len(places), tiles, row, end, group)] * tiles
            left, row = left - tiles, row + tiles * block_rows
        first_row = end
    return copy_to_device(places, device)


def compute_depth_bounds(sizes: Sequence[int], device: torch.device) -> Tensor:
    """Returns the start of each group's sum and the end of the last one: E + 1 numbers, int32.

    Args:
        sizes: length of each group's sum.
        device: to copy to, asynchronously.
    """
    return copy_to_device(list(accumulate(sizes, initial=0)), device)


def copy_to_device(numbers: Sequence[int] | Sequence[tuple[int, ...]], device: torch.device) -> Tensor:
    """Returns host integers as int32 on the device, copied asynchronously."""
    made = torch.tensor(numbers, dtype=torch.int32, pin_memory=device.type == "cuda")
    return made.to(device, non_blocking=True)


def make_matrices_describable(matrices: Tensor) -> Tensor:
    """Returns the matrices [E, N, K] if each can be described (`is_describable`), else a copy that can be."""
    num_groups, num_rows, num_columns = matrices.shape
    group_bytes = matrices.stride(0) * matrices.element_size()
    if is_describable(matrices[0]) and group_bytes > 0 and group_bytes % ALIGNMENT_BYTES == 0:
        return matrices
    granularity = ALIGNMENT_BYTES // matrices.element_size()
    width = granularity * triton.cdiv(num_columns, granularity)
    return matrices.new_empty(num_groups, num_rows, width)[:, :, :num_columns].copy_(matrices)


def num_programs(num_tiles_of_result: int, programs_per_sm: int, device: torch.device) -> int:
    """Number of programs that share the tiles: as many as run at the same time, at most one per tile."""
    if device.type != "cuda":
        return min(num_tiles_of_result, 2)  # Triton's interpreter; each program gets several tiles
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return min(num_tiles_of_result, programs_per_sm * multiprocessors)


def count_tiles(counts: Sequence[int]) -> list[int]:
    """Returns the number of tiles of 128 rows that cover each group."""
    return [num_tiles(count) for count in counts]
