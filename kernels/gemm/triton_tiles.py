"""Tiles of products of rows sorted by group, with one matrix per group: order, places, stores.

Groups have any number of rows. A tile of rows begins at the start of its group or a whole number of tiles after it, so
it may overlap the next group; those rows are computed but not stored. Tile positions are computed on the host from the
counts and copied asynchronously. Tiles of rows are ordered block by block. A block never spans two groups, so a group's
matrix is read from memory once. Results are stored under masks, because a tile at the end of a group overlaps the next
group's rows, which other programs store.
"""

# Shape legend: as in reference.py, and T tiles of rows in all groups.

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

PLACES = tl.constexpr(5)
KNOWN_MULTIPLE = 16  # Triton specializes kernels for multiples of this number only


def is_stored_at_once(num_columns: int) -> bool:
    """Whether all rows of so many columns begin at multiples of 16 bytes, the size of a vector store."""
    return num_columns % KNOWN_MULTIPLE == 0


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
