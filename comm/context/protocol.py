"""Defines the group of ranks that share each sequence, which is all that the model knows of it.

Ranks exchange rows: what attention of other tokens needs of a rank's tokens, as a tuple of tensors whose shapes are
equal on all ranks. Every rank of the group must make the same calls in the same order.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

from torch import Tensor

from comm.context.parts import SequenceParts
from comm.protocol import Work

Rows = tuple[Tensor, ...]  # what attention needs of one rank's tokens

Contribution = Callable[[int, Rows], Tensor]
"""Returns this rank's part of the gradient of the rows of a rank, given the rank's index and rows."""


class ContextGroup(Protocol):
    """Members that hold one part of each sequence each: ranks, or consecutive slices on one rank."""

    @property
    def size(self) -> int:
        """Number of ranks, c."""
        ...

    @property
    def index(self) -> int:
        """Index of this rank in the group."""
        ...

    def parts(self, own_tokens: int) -> SequenceParts:
        """Returns which tokens each member holds, given the number of tokens of a sequence on this rank."""
        ...

    @property
    def keeps_rows(self) -> bool:
        """Whether a caller should keep the rows of other ranks between `visit` and `collect`."""
        ...

    def visit(self, rows: Rows) -> Iterator[tuple[int, Rows]]:
        """Sends this rank's rows and yields the index and rows of every rank, first its own.

        The caller must take all of them. Other ranks' rows travel while the caller works on those before.
        """
        ...

    def collect(self, rows: Rows, kept: Mapping[int, Rows], contribute: Contribution) -> Work[Tensor]:
        """Returns the gradient of this rank's rows, summed over the group in a fixed order.

        Args:
            kept: rows of other ranks by index if `keeps_rows`; otherwise they are sent again.
            contribute: called once for each rank. All its results have one shape and type.
        """
        ...

    def sum(self, values: Tensor) -> Tensor:
        """Returns the sum of a small tensor over the group, equal bit for bit on all ranks. No gradient flows."""
        ...
