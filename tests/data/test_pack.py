"""Tests of packing: no token is lost, no document is cut needlessly, and no target crosses a border."""

import time

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data.pack import best_fit_decreasing, cut_pieces, pack_documents

PAD = 2


def documents_of(lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens that are all different, so that each can be tracked."""
    return np.arange(10, 10 + sum(lengths), dtype=np.int32), np.asarray(lengths, dtype=np.int64)


LENGTHS = st.lists(st.integers(0, 40), max_size=30)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(LENGTHS, st.integers(2, 17))
def test_packing_loses_and_invents_no_token(lengths: list[int], length: int) -> None:
    tokens, counts = documents_of(lengths)
    packed = pack_documents(tokens, counts, length, PAD)
    real = packed.positions_NL >= 0
    assert sorted(packed.tokens_NL[real].tolist()) == tokens.tolist()
    assert (packed.tokens_NL[~real] == PAD).all()
    # Padding is at the end, and no sequence is all padding.
    assert (np.diff(real.astype(int), axis=1) <= 0).all()
    assert real[:, 0].all()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(LENGTHS, st.integers(2, 17))
def test_the_position_rule_says_exactly_what_follows_within_a_piece(lengths: list[int], length: int) -> None:
    tokens, counts = documents_of(lengths)
    packed = pack_documents(tokens, counts, length, PAD)
    piece = {}
    for number, (start, size) in enumerate(zip(*cut_pieces(counts, length), strict=True)):
        piece.update(dict.fromkeys(tokens[start : start + size].tolist(), number))
    for row, positions in zip(packed.tokens_NL.tolist(), packed.positions_NL.tolist(), strict=True):
        for i in range(length):
            for k in range(1, length - i):
                rule = positions[i] >= 0 and positions[i + k] == positions[i] + k
                same = row[i] in piece and piece.get(row[i]) == piece.get(row[i + k])
                assert rule == same
                assert not rule or row[i + k] == row[i] + k


@settings(max_examples=100, deadline=None, derandomize=True)
@given(LENGTHS, st.integers(2, 17))
def test_only_documents_longer_than_a_sequence_are_cut(lengths: list[int], length: int) -> None:
    _, counts = documents_of(lengths)
    starts, sizes = cut_pieces(counts, length)
    assert len(starts) == sum(-(-size // length) for size in lengths)
    assert sizes.sum() == counts.sum()
    assert ((sizes >= 1) & (sizes <= length)).all()
    assert (starts[1:] == starts[:-1] + sizes[:-1]).all()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 23), max_size=60))
def test_bins_equal_those_of_a_plain_search_for_the_tightest_fit(lengths: list[int]) -> None:
    capacity = 23
    bins, num_bins = best_fit_decreasing(lengths, capacity)
    rooms: list[int] = []
    for size in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= size]
        if fitting:
            rooms[rooms.index(min(fitting))] -= size
        else:
            rooms.append(capacity - size)
    used = np.bincount(np.asarray(bins, dtype=np.int64), weights=lengths, minlength=num_bins) if lengths else []
    assert sorted(capacity - np.asarray(used)) == sorted(rooms)


def test_fifty_thousand_pieces_are_packed_quickly_and_tightly() -> None:
    rng = np.random.Generator(np.random.PCG64(0))
    lengths = rng.integers(1, 4097, size=50_000).tolist()
    begin = time.monotonic()
    _, num_bins = best_fit_decreasing(lengths, 4096)
    # About 0.1 s alone on a core; a quadratic search takes minutes.
    assert time.monotonic() - begin < 3.0
    assert num_bins <= 1.01 * sum(lengths) / 4096 + 1
