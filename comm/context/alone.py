"""Implements the context group of a rank that holds whole sequences."""

from collections.abc import Iterator, Mapping

from torch import Tensor

from comm.context.parts import SequenceParts, zigzag_parts
from comm.context.protocol import Contribution, Rows
from comm.protocol import CompletedWork, Work


class SingleRankContext:
    """Implements `ContextGroup` for one rank, without communication."""

    size = 1
    index = 0
    keeps_rows = True

    def parts(self, own_tokens: int) -> SequenceParts:
        """Implements `ContextGroup.parts`."""
        return zigzag_parts(own_tokens, 1)

    def visit(self, rows: Rows) -> Iterator[tuple[int, Rows]]:
        """Implements `ContextGroup.visit`."""
        yield 0, rows

    def collect(self, rows: Rows, kept: Mapping[int, Rows], contribute: Contribution) -> Work[Tensor]:
        """Implements `ContextGroup.collect`."""
        return CompletedWork(contribute(0, rows))

    def sum(self, values: Tensor) -> Tensor:
        """Implements `ContextGroup.sum`."""
        return values


ALONE = SingleRankContext()  # the context group of a rank that holds whole sequences
