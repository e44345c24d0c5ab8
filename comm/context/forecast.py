"""Predicts the bytes that a rank of a context group sends. Imports no torch."""

from dataclasses import dataclass

MOST_GATHERED_RANKS = 16
"""Largest context group that gathers the rows of all ranks; a larger one passes them around a ring."""


def num_kept_ranks(size: int) -> int:
    """Returns the number of other ranks whose rows a rank keeps until the backward."""
    return size - 1 if size <= MOST_GATHERED_RANKS else 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ContextBytes:
    """Bytes that one rank sends to other ranks for one layer and micro-batch."""

    forward: int
    backward: int


def forecast_context_bytes(
    *, size: int, num_tokens: int, row_bytes: int, gradient_bytes: int, wide_gradient_bytes: int, is_ring: bool
) -> ContextBytes:
    """Predicts what a rank sends. Each of c ranks holds T / c tokens of each sequence.

    With an all-gather, a rank sends the rows of its tokens to c - 1 ranks, and in the backward one part of the gradient
    to each of them. In a ring it forwards c - 1 messages as large as its own rows, and as many again in the backward,
    with as many sums of gradients in `wide_gradient_bytes` per token. `num_tokens` are those of all ranks of the group.
    """
    sent = num_tokens // size * (size - 1)
    if is_ring:
        return ContextBytes(forward=sent * row_bytes, backward=sent * (row_bytes + wide_gradient_bytes))
    return ContextBytes(forward=sent * row_bytes, backward=sent * gradient_bytes)
