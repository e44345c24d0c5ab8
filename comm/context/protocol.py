"""Defines the group of ranks that share each sequence, which is all that the model knows of it.

Ranks exchange rows: what attention of other tokens needs of a rank's tokens, as a tuple of tensors whose shapes are
equal on all ranks. Every rank of the group must make the same calls in the same order.

Sequences are cut into 2c equal segments, of which rank i of c holds segments i and 2c - 1 - i. A token attends to all
tokens before it, so a rank with an early and a late segment has as much work as every other rank.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from comm.protocol import CompletedWork, Work


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceParts:
    """Consecutive segments of sequences, and the members that hold them."""

    edges: tuple[int, ...]  # first token of each segment, then the number of tokens of a whole sequence
    held: tuple[tuple[int, ...], ...]  # segments of each member, ascending

    @property
    def num_tokens(self) -> int:
        """Number of tokens of a whole sequence."""
        return self.edges[-1]

    def slices(self, index: int) -> tuple[slice, ...]:
        """Returns the places of a member's tokens in a whole sequence."""
        return tuple(slice(self.edges[each], self.edges[each + 1]) for each in self.held[index])

    def tokens_of(self, index: int) -> int:
        """Returns the number of tokens of a sequence that a member holds."""
        return sum(each.stop - each.start for each in self.slices(index))

    def take(self, values: Tensor, index: int, dim: int = 1) -> Tensor:
        """Returns what a member holds of whole sequences, in its order; a view if it has one segment."""
        parts = [values.narrow(dim, each.start, each.stop - each.start) for each in self.slices(index)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def put(self, part_BT: Tensor, index: int, whole_BT: Tensor) -> None:
        """Writes what a member holds to its places in whole sequences; reverses `take` along dimension 1."""
        start = 0
        for each in self.slices(index):
            tokens = each.stop - each.start
            whole_BT[:, each] = part_BT[:, start : start + tokens]
            start += tokens


def segments_of(index: int, size: int) -> tuple[int, int]:
    """Returns the two segments that a rank holds, in order."""
    return index, 2 * size - 1 - index


def segment_tokens(num_tokens: int, size: int) -> int:
    """Returns the tokens of a segment of a whole sequence; raises ValueError if they would not be equal."""
    if num_tokens % (2 * size) and size > 1:
        nearest = max(1, round(num_tokens / (2 * size))) * 2 * size
        raise ValueError(
            f"context: the length of a sequence must be a multiple of {2 * size}, two segments for each of {size} "
            f"ranks, is {num_tokens}; nearest valid: {nearest}"
        )
    return num_tokens // (2 * size)


@lru_cache(maxsize=256)
def zigzag_parts(num_tokens: int, size: int) -> SequenceParts:
    """Returns which tokens of a whole sequence each rank holds; raises ValueError as `segment_tokens`."""
    if size == 1:
        return SequenceParts(edges=(0, num_tokens), held=((0,),))
    tokens = segment_tokens(num_tokens, size)
    held = tuple(segments_of(index, size) for index in range(size))
    return SequenceParts(edges=tuple(range(0, num_tokens + 1, tokens)), held=held)


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

        `kept` holds rows of other ranks if `keeps_rows`; otherwise they are sent again. `contribute` is called for each
        rank.
        """
        ...

    def sum(self, values: Tensor) -> Tensor:
        """Returns the sum of a small tensor over the group, equal bit for bit on all ranks. No gradient flows."""
        ...


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
