"""How a product in FP8 is cut up for a GPU; any way gives the same numbers."""

from dataclasses import dataclass

from kernels.quantize.layout import TILE

SMALLEST_SIDE = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiling:
    """Tiles of the result, and what a program works on them with.

    Attributes:
        rows: of a tile; a power of two, 64 at least for the tensor cores' own instructions.
        outputs: columns of a tile; a power of two, 128 at most, so that a block's scale serves all of a tile.
        group: tile rows that are done together, column by column.
        specialize: some warps only load, twice as many multiply as `warps` says; `warps` is then to be 4.
        programs_per_sm: that run at the same time on a multiprocessor.
        warps: of a program.
        stages: tiles of the operands in shared memory, under way or in use.
    """

    rows: int = 128
    outputs: int = 128
    group: int = 8
    specialize: bool = False
    programs_per_sm: int = 1
    warps: int = 8
    stages: int = 4

    def __post_init__(self) -> None:
        """Refuses sizes that no kernel is made for.

        Raises:
            ValueError: a side is no power of two in [16, 128].
        """
        for name, side in (("rows", self.rows), ("outputs", self.outputs)):
            if not SMALLEST_SIDE <= side <= TILE or side & (side - 1):
                nearest = min((16, 32, 64, 128), key=lambda valid: abs(valid - side))
                raise ValueError(f"Tiling: {name} must be a power of two in [16, 128], got {side}; nearest: {nearest}")


STORED_BY_DESCRIPTOR = Tiling()
# A scale for each output beside one for each row takes registers: under Triton 3.6 a tile of 128 x 128 spills some.
OF_COLUMNS = Tiling(outputs=64)
# Addresses of a masked store take registers: a smaller tile, so that none spill.
STORED_BY_MASK = Tiling(outputs=64)
