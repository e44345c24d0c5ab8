"""Tile sizes of a grouped product of 16- or 32-bit numbers; they change only the order of sums."""

from dataclasses import dataclass

import torch

SMALLEST_SIDE = 16
KNOWN_MULTIPLE = 16  # Triton specializes kernels for multiples of this number only
LARGEST_SIDE = 256
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupedTiling:
    """Tile sizes of the result, and the resources of a program.

    Attributes:
        rows: rows per tile, a power of two; at least 64 for `wgmma` instructions.
        columns: columns per tile, a power of two.
        depth: numbers that are multiplied and added at a time, a power of two.
        height: tile rows that are processed together, column by column.
        programs_per_sm: programs that run at the same time on a multiprocessor.
        warps: warps per program.
        stages: tiles of the operands in shared memory, in flight or in use.
    """

    rows: int = 128
    columns: int = 256
    depth: int = 64
    height: int = 8
    programs_per_sm: int = 1
    warps: int = 8
    stages: int = 3

    def __post_init__(self) -> None:
        """Checks that a kernel supports the sizes.

        Raises:
            ValueError: a side is not a power of two in [16, 256].
        """
        for name, side in (("rows", self.rows), ("columns", self.columns), ("depth", self.depth)):
            if not SMALLEST_SIDE <= side <= LARGEST_SIDE or side & (side - 1):
                nearest = min((16, 32, 64, 128, 256), key=lambda valid: abs(valid - side))
                raise ValueError(
                    f"GroupedTiling: {name} must be a power of two in [16, 256], got {side}; nearest: {nearest}"
                )


OF_16_BITS = GroupedTiling()
# Unaligned stores take registers for their addresses: a smaller tile avoids spills.
OF_16_BITS_ONE_BY_ONE = GroupedTiling(columns=128, stages=4)
# Full float32 does not use tensor cores: sums and operands share the registers.
OF_32_BITS = GroupedTiling(rows=64, columns=64, depth=32, programs_per_sm=2)


def is_stored_at_once(num_columns: int) -> bool:
    """Whether all rows of so many columns begin at multiples of 16 bytes, the size of a vector store."""
    return num_columns % KNOWN_MULTIPLE == 0


def choose_tiling(subject: str, dtype: torch.dtype, num_columns: int) -> GroupedTiling:
    """Returns the tiling for a result.

    Args:
        subject: name of the operation, for the message.
        dtype: type of operands and result.

    Raises:
        ValueError: no kernel supports the type.
    """
    if dtype not in DTYPES:
        valid = ", ".join(str(each).removeprefix("torch.") for each in DTYPES)
        raise ValueError(f"{subject}: the type must be one of {valid}, got {dtype}; nearest: float32")
    if dtype == torch.float32:
        return OF_32_BITS
    return OF_16_BITS if is_stored_at_once(num_columns) else OF_16_BITS_ONE_BY_ONE
