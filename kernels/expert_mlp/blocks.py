"""How the rows of all experts are cut into blocks of experts that are worked on at once."""

from collections.abc import Sequence
from dataclasses import dataclass

BLOCK_NUMBERS = 2**20  # four megabytes of float32


@dataclass(frozen=True, slots=True)
class Block:
    """Experts after one another. rows: theirs among all. experts: each one's number and its rows within the block."""

    rows: slice
    experts: tuple[tuple[int, slice], ...]

    @property
    def size(self) -> int:
        """Number of rows."""
        return int(self.rows.stop - self.rows.start)


def cut(counts: Sequence[int], width: int) -> list[Block]:
    """Blocks of whole experts, so many that what lies between their products stays in the cache.

    Args:
        counts: rows of each expert.
        width: numbers that a row has between the products.
    """
    most, first, blocks = max(1, BLOCK_NUMBERS // width), 0, list[Block]()
    members, size = list[tuple[int, slice]](), 0
    for expert, count in (*enumerate(counts), (len(counts), most + 1)):
        if members and size + count > most:
            blocks.append(Block(slice(first, first + size), tuple(members)))
            first, members, size = first + size, [], 0
        if count:
            members.append((expert, slice(size, size + count)))
            size += count
    return blocks
