"""Says which tokens of whole sequences each member of a context group holds."""

from dataclasses import dataclass

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
