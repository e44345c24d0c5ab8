"""Tests of batch sizes: they are a pure function of the step and read every sequence once, in order."""

from itertools import pairwise

import pytest

from data.batch_sizes import BatchRamp, BatchSizes, ramp_sizes


def test_batch_sizes_without_a_ramp_are_one() -> None:
    sizes = BatchSizes(12, 10)
    assert sizes.sizes == (12,)
    assert [sizes.sequences(step) for step in (0, 7, 10**9)] == [12] * 3
    assert sizes.sequences_before(5) == 60
    assert sizes.tokens_before(5) == 600


@pytest.mark.parametrize(
    ("last", "length", "ramp"),
    [
        (16, 10, BatchRamp(start_sequences=4, end_tokens=777, num_sizes=4)),
        (5, 3, BatchRamp(start_sequences=1, end_tokens=1, num_sizes=5)),
        (7, 1, BatchRamp(start_sequences=6, end_tokens=1000, num_sizes=2)),
    ],
)
def test_batch_sizes_of_a_ramp_leave_no_sequence_out_and_read_none_twice(
    last: int, length: int, ramp: BatchRamp
) -> None:
    sizes, read = BatchSizes(last, length, ramp), 0
    seen = []
    for step in range(1200):
        assert sizes.sequences_before(step) == read
        assert sizes.tokens_before(step) == read * length
        if read * length < ramp.end_tokens:
            assert sizes.sequences(step) < last
        seen.append(sizes.sequences(step))
        read += seen[-1]
    assert all(later >= earlier for earlier, later in pairwise(seen))
    assert set(seen) == set(sizes.sizes) <= set(ramp_sizes(last, ramp))
    assert seen[0] == ramp.start_sequences
    assert seen[-1] == last
    grown = seen.index(last)
    assert sizes.tokens_before(grown) < ramp.end_tokens + ramp.num_sizes * last * length


def test_batch_sizes_of_deepseek_v3_reach_the_last_after_469_billion_tokens() -> None:
    sizes = BatchSizes(15360, 4096, BatchRamp(start_sequences=3072, end_tokens=469 * 10**9, num_sizes=5))
    assert sizes.sizes == (3072, 6144, 9216, 12288, 15360)
    grown = next(step for step in range(0, 10**5) if sizes.sequences(step) == 15360)
    assert 469e9 <= sizes.tokens_before(grown) < 469e9 + 5 * 63e6
    assert 15_000 < grown < 20_000
