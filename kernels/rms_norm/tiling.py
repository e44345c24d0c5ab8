"""How rows are shared out among programs: a program holds whole rows in registers."""

from dataclasses import dataclass

from torch import Tensor

from kernels.rms_norm import LARGEST_COLUMNS

SMALLEST_COLUMNS = 128  # a tile of codes
WARP_THREADS = 32
PROGRAM_NUMBERS = 2**12
WARPS_WITH_SUMS = 132 * 16  # 16 for each processor of an H100, on every device, so that sums never change


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiling:
    """A program's share.

    Attributes:
        block_rows: rows at a time.
        block_columns: power of two that covers a row.
        num_warps: of a program.
        num_programs: that stay for many blocks of rows, where they sum over them.
    """

    block_rows: int
    block_columns: int
    num_warps: int
    num_programs: int


def tiling(
    subject: str, num_columns: int, block_rows: int | None, num_warps: int | None, *, has_sums: bool = False
) -> Tiling:
    """As many rows as fill a program, and as many warps as hold them without spilling.

    Args:
        subject: place and name of the rows, for the message.
        num_columns: of a row, above 0.
        block_rows: given by the caller, a power of two, or None.
        num_warps: given by the caller, or None.
        has_sums: a program stays for many blocks of rows, whose sums per column it holds too.

    Raises:
        ValueError: rows are too long for the registers of a program.
    """
    if num_columns > LARGEST_COLUMNS:
        raise ValueError(
            f"{subject} must have at most {LARGEST_COLUMNS} columns, got {num_columns}; nearest: {LARGEST_COLUMNS}"
        )
    block_columns = max(SMALLEST_COLUMNS, 1 << (num_columns - 1).bit_length())
    rows = block_rows or max(1, PROGRAM_NUMBERS // block_columns)
    thread_numbers = 16 if has_sums else 32
    warps = num_warps or min(16, max(1, rows * block_columns // (thread_numbers * WARP_THREADS)))
    return Tiling(block_rows=rows, block_columns=block_columns, num_warps=warps, num_programs=WARPS_WITH_SUMS // warps)


def check_columns(subject: str, matrix: Tensor) -> None:
    """Refuses a matrix whose columns lie apart in memory.

    Raises:
        ValueError: they do.
    """
    if matrix.shape[1] > 1 and matrix.stride(1) != 1:
        raise ValueError(f"{subject} must be contiguous along its columns, got strides {matrix.stride()}")
