"""Cuts sequences into equal segments and assigns two of them to each rank of a context group.

Of 2c segments, rank i holds segments i and 2c - 1 - i. A token attends to all tokens before it, so a rank with an early
and a late segment has as much work as every other rank. Shape legend: c ranks, S tokens of a segment.
"""

from functools import lru_cache

from comm.context.parts import SequenceParts


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
