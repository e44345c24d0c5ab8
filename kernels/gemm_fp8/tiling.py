"""Tile sizes of a product in FP8 on a GPU. Every tiling gives the same numbers."""

from dataclasses import dataclass

from kernels.tiles import TILE

SMALLEST_SIDE = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiling:
    """Tile sizes of the result, and the resources of a program."""

    rows: int = 128  # rows per tile, a power of two; at least 64 for `wgmma` instructions
    outputs: int = 128  # columns per tile, a power of two, at most 128, so that one block scale covers a whole tile
    group: int = 8  # tile rows that are processed together, column by column
    specialize: bool = False  # whether some warps only load; `warps` must be 4 then, and twice as many multiply
    programs_per_sm: int = 1  # programs that run at the same time on a multiprocessor
    warps: int = 8  # warps per program
    stages: int = 4  # tiles of the operands in shared memory, in flight or in use

    def __post_init__(self) -> None:
        """Raises ValueError if a side is not a power of two in [16, 128]."""
        check_sides("Tiling", TILE, rows=self.rows, outputs=self.outputs)

    @property
    def resources(self) -> dict[str, int | bool]:
        """Arguments of a launch that are the same for all kernels with this tiling."""
        return resources(self.warps, self.stages) | {"SPECIALIZE": self.specialize}


def resources(warps: int, stages: int) -> dict[str, int | bool]:
    """Returns the arguments of a launch of a pipelined product."""
    return {"NUM_STAGES": stages, "num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


def check_sides(subject: str, largest: int, **sides: int) -> None:
    """Raises ValueError if a side of a tile is not a power of two in [16, largest]."""
    for name, side in sides.items():
        if not SMALLEST_SIDE <= side <= largest or side & (side - 1):
            valid = (16, 32, 64, 128, 256)
            nearest = min((size for size in valid if size <= largest), key=lambda size: abs(size - side))
            rule = f"must be a power of two in [16, {largest}]"
            raise ValueError(f"{subject}: {name} {rule}, got {side}; nearest: {nearest}")


STORED_BY_DESCRIPTOR = Tiling()
# A scale per output in addition to one per row takes registers: under Triton 3.6 a tile of 128 x 128 spills.
OF_COLUMNS = Tiling(outputs=64)
# Addresses of a masked store take registers: a smaller tile avoids spills.
STORED_BY_MASK = Tiling(outputs=64)
