"""Groups sequences of similar length, so that a batch has little padding. Imports no torch."""

from collections.abc import Iterator, Sequence

from infer.evaluate.protocol import TargetSequence

MOST_TOKENS = 2**15
"""Tokens, with padding, that are computed together if there are several sequences."""


def by_length(
    sequences: Sequence[TargetSequence], batch_size: int, most_tokens: int = MOST_TOKENS
) -> Iterator[list[int]]:
    """Yields the numbers of sequences that are computed together, the longest first.

    Args:
        sequences: in any order.
        batch_size: maximum number of sequences.
        most_tokens: maximum number of tokens with padding; a single sequence may have more.
    """
    order = sorted(range(len(sequences)), key=lambda number: -len(sequences[number].tokens))
    first = 0
    while first < len(order):
        longest = len(sequences[order[first]].tokens) - 1
        size = max(1, min(batch_size, most_tokens // longest))
        yield order[first : first + size]
        first += size
