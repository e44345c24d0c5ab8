"""Which rows an expert's products read: its own, or a few more where odd sizes would cost more than spare rows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

STEP_ROWS = 64


@dataclass(frozen=True, slots=True)
class Window:
    """The rows of one expert that has any.

    rows: its own, in the array of all rows. span: what is read, its own among them. inner: its own, within the span.
    """

    expert: int
    rows: slice
    span: slice
    inner: slice

    @property
    def is_exact(self) -> bool:
        """Whether no other row is read."""
        return self.rows == self.span


def windows(counts: Sequence[int], dtype: torch.dtype) -> Iterator[Window]:
    """The window of each expert with rows, in order.

    On CPU oneDNN compiles a product of 16-bit numbers for each new shape, in more time than the product takes; so their
    sizes are rounded up to a multiple of 64, by reading rows of neighbouring experts whose results are dropped.
    """
    total, first = sum(counts), 0
    step = STEP_ROWS if dtype in (torch.bfloat16, torch.float16) else 1
    for expert, count in enumerate(counts):
        if count:
            size = min(total, -(-count // step) * step)
            start = min(first, total - size)
            rows, inner = slice(first, first + count), slice(first - start, first - start + count)
            yield Window(expert, rows, slice(start, start + size), inner)
        first += count
