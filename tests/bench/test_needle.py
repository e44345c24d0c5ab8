"""Tests the needle test: its rows, its determinism, and on a short recipe that YaRN extends a context by 8."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from bench.needle.experiment import BASE_LENGTH, LONG_LENGTH, Recipe, run_seed
from bench.needle.rows import VOCAB_SIZE, Rows, is_key

SHORT = Recipe(base_steps=300, long_steps=20, samples=6, lengths=(BASE_LENGTH, LONG_LENGTH))


def test_rows_are_the_same_for_a_seed_and_hold_each_answer() -> None:
    first, second = (Rows(3).batch(16, BASE_LENGTH) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, Rows(4).batch(16, BASE_LENGTH))
    assert first.shape == (16, BASE_LENGTH)
    assert int(first.max()) < VOCAB_SIZE
    for row in first:
        pairs = {(int(key), int(value)) for key, value in pairwise(row) if is_key(key)}
        assert len({key for key, _ in pairs}) == len(pairs)  # a key has one value


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_needle_is_at_its_depth_and_its_key_at_the_end(depth: float) -> None:
    row, value = Rows(5).needle(LONG_LENGTH, depth)
    assert len(row) == LONG_LENGTH
    places = np.flatnonzero(row >= 256)
    assert row[places].tolist() == [row[-1], value, row[-1]]
    assert places[0] == round(depth * (LONG_LENGTH - 3))


@pytest.mark.exhaustive
def test_yarn_extends_a_context_by_eight() -> None:
    """A quarter of the steps of `python -m bench.needle`, whose results are in docs/benchmarks.md."""
    found = run_seed(0, SHORT)
    far = {name: each.mean(LONG_LENGTH) for name, each in found.items()}
    assert found["plain"].mean(BASE_LENGTH) >= 0.25
    assert far["plain"] <= 0.20
    assert far["yarn"] >= 2 * far["plain"]
    assert far["yarn_trained"] >= far["plain_trained"] + 0.10
    assert found["yarn_trained"].last_bits <= found["plain_trained"].last_bits - 0.10
