"""Says which tokens of whole sequences each member of a context group holds.

Sequences are cut into 2c equal segments, of which rank i of c holds segments i and 2c - 1 - i. A token attends to all
tokens before it, so a rank with an early and a late segment has as much work as every other rank.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


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
