"""Tests that samples are packed whole, cut or dropped, and that their values reach the batches."""

import numpy as np

from data.registry import SamplePiece, TrainingSample
from data.samples.pack import WEIGHTS, pack_samples


def sample(key: str, *sizes: int, may_be_cut: bool = False, first_target: int = 0) -> TrainingSample:
    """Returns a sample whose tokens count from 1 and whose weights are 1 from `first_target` on."""
    pieces = []
    for size in sizes:
        weights = (np.arange(size) >= first_target).astype(np.float32)
        weights[-1] = 0
        tops = np.arange(size * 2, dtype=np.int32).reshape(size, 2)
        pieces.append(SamplePiece(tokens=np.arange(1, size + 1), values={WEIGHTS: weights, "tops": tops}))
    return TrainingSample(key=key, pieces=tuple(pieces), may_be_cut=may_be_cut)


def test_pieces_of_a_sample_stay_together_and_keep_their_values() -> None:
    packed = pack_samples([sample("a", 3, 2), sample("b", 4), sample("c", 2, 2)], 6, pad_id=0, vocab_size=10)
    assert packed.counts.kept == 3
    rows = {tuple(row) for row in packed.tokens_NL.tolist()}
    assert rows == {(1, 2, 3, 1, 2, 0), (1, 2, 3, 4, 0, 0), (1, 2, 1, 2, 0, 0)}
    row = packed.tokens_NL.tolist().index([1, 2, 3, 1, 2, 0])
    assert packed.positions_NL[row].tolist() == [0, 1, 2, 0, 1, -1]
    assert packed.values[WEIGHTS][row].tolist() == [1, 1, 0, 1, 0, 0]
    assert packed.values["tops"][row].tolist() == [[0, 1], [2, 3], [4, 5], [0, 1], [2, 3], [0, 0]]


def test_long_samples_are_cut_if_they_may_be_and_else_dropped() -> None:
    samples = [
        sample("cut", 8, may_be_cut=True),
        sample("dropped", 8),
        sample("prompt too long", 8, may_be_cut=True, first_target=5),
        sample("pair", 3, 4),
    ]
    packed = pack_samples(samples, 6, pad_id=0, vocab_size=10)
    assert (packed.counts.kept, packed.counts.cut, packed.counts.dropped) == (1, 1, 3)
    assert packed.tokens_NL.tolist() == [[1, 2, 3, 4, 5, 6]]
    assert packed.values[WEIGHTS].tolist() == [[1, 1, 1, 1, 1, 0]]
