"""Cuts sequences along their tokens into slices of equal work. Imports no torch."""

from itertools import accumulate, pairwise
from math import sqrt

from model.account.work import count_work
from model.config import ModelConfig

_TILE = 128
_TILES_PER_SLICE = 8
"""Slices of at least so many tiles end at a tile's border, so that products in FP8 have whole tiles."""


def slice_lengths(config: ModelConfig, sequence_length_tokens: int, slices: int, *, is_fp8: bool) -> tuple[int, ...]:
    """Returns the tokens of each slice of a sequence, so that all slices have about equal work.

    A later token attends to more tokens, so later slices are shorter. The lengths depend on the model because the share
    of attention does.

    Args:
        sequence_length_tokens: tokens of a sequence.
        slices: number of slices, at least 1.
        is_fp8: whether products of linear maps in layers are in FP8.

    Raises:
        ValueError: a slice would have no token.
    """
    length = sequence_length_tokens
    if not 1 <= slices <= length:
        raise ValueError(f"must be in 1 to {length}, the tokens of a sequence, is {slices}; nearest valid: {length}")
    fixed = count_work(config, 0, is_fp8=is_fp8).total(config)
    # The first x tokens cost fixed * x + growth * x^2 / 2.
    growth = 2 * (count_work(config, length, is_fp8=is_fp8).total(config) - fixed) / length
    whole = fixed * length + growth * length**2 / 2
    unit = _TILE if length >= slices * _TILES_PER_SLICE * _TILE else 1
    ends = [0]
    for index in range(1, slices):
        work = whole * index / slices
        end = (sqrt(fixed**2 + 2 * growth * work) - fixed) / growth if growth else work / fixed
        # Every slice keeps at least one unit.
        ends.append(min(max(round(end / unit) * unit, ends[-1] + unit), length - (slices - index) * unit))
    return tuple(after - before for before, after in pairwise([*ends, length]))


def slice_starts(lengths: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the first token of each slice, then the number of all tokens."""
    return (0, *accumulate(lengths))
