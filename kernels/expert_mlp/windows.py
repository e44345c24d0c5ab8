"""How the rows of all experts are cut into blocks of experts that are worked on at once."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

BLOCK_NUMBERS = 2**20  # four megabytes of float32
STEP_ROWS = 64


@dataclass(frozen=True, slots=True)
class Reach:
    """Some rows, and those that are read for them. rows: the own ones. span: what is read. inner: rows within span. size: of span."""

    rows: slice
    span: slice
    inner: slice

    size: int

    @property
    def is_exact(self) -> bool:
        """Whether no other row is read."""
        return self.rows == self.span


@dataclass(frozen=True, slots=True)
class Block:
    """Experts after one another. reach: their rows among all. experts: each one's number and its rows in the span."""

    reach: Reach
    experts: tuple[tuple[int, Reach], ...]

    @property
    def size(self) -> int:
        """Rows that are read."""
        return self.reach.size


def cut(counts: Sequence[int], width: int, dtype: torch.dtype) -> list[Block]:
    """Blocks of whole experts, so many that what lies between their products stays in the cache.

    On CPU oneDNN compiles a product of 16-bit numbers for each new shape, in more time than the product takes; so their
    sizes are rounded up to a multiple of 64, by reading rows of neighbouring experts whose results are dropped.

    Args:
        counts: rows of each expert.
        width: numbers that a row has between the products.
        dtype: of the rows.
    """
    most, step = max(1, BLOCK_NUMBERS // width), STEP_ROWS if dtype in (torch.bfloat16, torch.float16) else 1
    total, first, blocks = sum(counts), 0, []
    members, size = list[tuple[int, int]](), 0
    for expert, count in (*enumerate(counts), (len(counts), most + 1)):
        if members and size + count > most:
            blocks.append(_block(_reach(first, size, total, step), members, step))
            first, members, size = first + size, [], 0
        if count:
            members.append((expert, count))
            size += count
    return blocks


def _block(reach: Reach, members: Sequence[tuple[int, int]], step: int) -> Block:
    place, experts = int(reach.inner.start), []
    for expert, count in members:
        experts.append((expert, _reach(place, count, reach.size, step)))
        place += count
    return Block(reach, tuple(experts))


def _reach(first: int, count: int, total: int, step: int) -> Reach:
    size = min(total, -(-count // step) * step)
    start = min(first, total - size)
    inner = slice(first - start, first - start + count)
    return Reach(slice(first, first + count), slice(start, start + size), inner, size)
