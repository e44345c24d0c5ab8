"""Parts of sequences that the ranks of a context group hold, and whole sequences from all parts."""

from collections.abc import Sequence

from torch import Tensor

from comm.protocol import zigzag_parts


def take_held(values: Tensor, index: int, size: int) -> Tensor:
    """Returns what a rank holds of whole sequences, along dimension 1."""
    return zigzag_parts(values.shape[1], size).take(values, index)


def join_held(parts: Sequence[Tensor]) -> Tensor:
    """Returns whole sequences from the parts of all ranks, by index."""
    held = zigzag_parts(sum(part.shape[1] for part in parts), len(parts))
    whole = parts[0].new_empty(len(parts[0]), held.num_tokens, *parts[0].shape[2:])
    for index, part in enumerate(parts):
        held.put(part, index, whole)
    return whole
