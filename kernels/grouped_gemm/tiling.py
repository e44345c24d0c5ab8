"""How a grouped product of 16 or 32 bits a number is cut up for a GPU; any way gives the same sums in another order."""

from dataclasses import dataclass

import torch

SMALLEST_SIDE = 16
KNOWN_MULTIPLE = 16  # Triton compiles in whether a number is a multiple of that, and of nothing else
LARGEST_SIDE = 256
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupedTiling:
    """Tiles of the result, and what a program works on them with.

    Attributes:
        rows: of a tile; a power of two, 64 at least for the tensor cores' own instructions.
        columns: of a tile; a power of two.
        depth: numbers that are multiplied and added at a time; a power of two.
        height: tile rows that are done together, column by column.
        programs_per_sm: that run at the same time on a multiprocessor.
        warps: of a program.
        stages: tiles of the operands in shared memory, under way or in use.
    """

    rows: int = 128
    columns: int = 256
    depth: int = 64
    height: int = 8
    programs_per_sm: int = 1
    warps: int = 8
    stages: int = 3

    def __post_init__(self) -> None:
        """Refuses sizes that no kernel is made for.

        Raises:
            ValueError: a side is no power of two in [16, 256].
        """
        for name, side in (("rows", self.rows), ("columns", self.columns), ("depth", self.depth)):
            if not SMALLEST_SIDE <= side <= LARGEST_SIDE or side & (side - 1):
                nearest = min((16, 32, 64, 128, 256), key=lambda valid: abs(valid - side))
                raise ValueError(
                    f"GroupedTiling: {name} must be a power of two in [16, 256], got {side}; nearest: {nearest}"
                )


OF_16_BITS = GroupedTiling()
# Numbers that are stored one by one take registers for their addresses: a smaller tile, so that none spill.
OF_16_BITS_ONE_BY_ONE = GroupedTiling(columns=128, stages=4)
# In full float32 no tensor core multiplies: sums and operands share the registers.
OF_32_BITS = GroupedTiling(rows=64, columns=64, depth=32, programs_per_sm=2)


def is_stored_at_once(num_columns: int) -> bool:
    """Whether rows of so many columns are known to begin at multiples of 16 bytes, of which a store moves as many."""
    return num_columns % KNOWN_MULTIPLE == 0


def choose_tiling(subject: str, dtype: torch.dtype, num_columns: int) -> GroupedTiling:
    """The one that suits a result.

    Args:
        subject: what it is for, for the message.
        dtype: of operands and result.
        num_columns: of the result.

    Raises:
        ValueError: no kernel multiplies that type.
    """
    if dtype not in DTYPES:
        valid = ", ".join(str(each).removeprefix("torch.") for each in DTYPES)
        raise ValueError(f"{subject}: the type must be one of {valid}, got {dtype}; nearest: float32")
    if dtype == torch.float32:
        return OF_32_BITS
    return OF_16_BITS if is_stored_at_once(num_columns) else OF_16_BITS_ONE_BY_ONE
