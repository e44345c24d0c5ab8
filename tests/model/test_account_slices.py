"""Slices of equal work."""

from itertools import accumulate, pairwise

import pytest

from model.size import count_work, slice_lengths, slice_starts
from tests.model.test_account import preset


@pytest.mark.parametrize("name", ["v3_671b", "v2_lite_16b", "quickstart"])
@pytest.mark.parametrize("length", [4096, 32768, 131072])
@pytest.mark.parametrize("slices", [1, 2, 4, 16])
def test_slices_have_equal_work(name: str, length: int, slices: int) -> None:
    model = preset(name)
    lengths = slice_lengths(model, length, slices, is_fp8=False)
    assert sum(lengths) == length
    assert slice_starts(lengths) == tuple(accumulate(lengths, initial=0))
    # Work of the first x tokens: they cost x times the mean cost of a token in a sequence of x tokens.
    first = [x and x * count_work(model, x, is_fp8=False).total(model) for x in slice_starts(lengths)]
    works = [after - before for before, after in pairwise(first)]
    # A border is off by at most half a unit of 128 tokens, or of 1 if slices are short.
    last_token = works[-1] / lengths[-1]
    unit = 128 if length >= slices * 1024 else 1
    assert max(works) - min(works) <= 2 * unit * last_token + 1e-9 * first[-1]
    assert all(tokens % unit == 0 for tokens in lengths)
    # Later tokens attend to more, so later slices are not longer than earlier ones by more than the rounding.
    assert all(later <= earlier + unit for earlier, later in pairwise(lengths))


def test_later_slices_of_long_sequences_are_shorter() -> None:
    lengths = slice_lengths(preset("v3_671b"), 131072, 4, is_fp8=True)
    assert lengths[0] > 1.5 * lengths[3]


def test_every_slice_has_a_token() -> None:
    assert slice_lengths(preset("quickstart"), 5, 5, is_fp8=False) == (1, 1, 1, 1, 1)
    with pytest.raises(ValueError, match="must be in 1 to 5, the tokens of a sequence, is 6; nearest valid: 5"):
        slice_lengths(preset("quickstart"), 5, 6, is_fp8=False)
