"""Laws of the order of a mixture: every prefix has its weights, and any part of it can be read alone."""

import tracemalloc

import numpy as np
import pytest

from data.mix.mixture import KeyedPermutation
from data.mix.order import MixOrder


def phases_of(draw: np.random.Generator, num_sources: int, num_phases: int) -> list[tuple[int, list[float]]]:
    """Returns random phases: weights of several kinds, some of them 0, none of which is normalized."""
    phases = []
    first = 0
    for _ in range(num_phases):
        kinds = (draw.random, draw.standard_exponential, lambda n: 10 ** draw.uniform(-6, 1, n), np.ones)
        weights = np.asarray(kinds[draw.integers(4)](num_sources))
        weights[1:] *= draw.random(num_sources - 1) > 0.1
        phases.append((first, weights.tolist()))
        first += int(draw.integers(1, 900))
    return phases


@pytest.mark.parametrize("number", [2, pytest.param(150, marks=pytest.mark.exhaustive)])
def test_no_prefix_is_more_than_one_sequence_off_its_weights(number: int) -> None:
    draw = np.random.default_rng(number)
    length = 3000 if number < 100 else 60_000
    for num_sources in (1, 2, 3, 5, 20, 64):
        for _ in range(number):
            phases = phases_of(draw, num_sources, int(draw.integers(1, 4)))
            order = MixOrder(phases)
            places = order.places(0, length)
            counts = np.cumsum(places.sources_N[:, None] == np.arange(num_sources), axis=0)
            rates = np.zeros((length, num_sources))
            for first, weights in phases:
                rates[first:] = np.array(weights) / sum(weights)
            worst = np.abs(counts - np.cumsum(rates, axis=0)).max()
            assert worst < 1 + 1e-6, (phases, worst)
            numbers = counts[np.arange(length), places.sources_N] - 1
            assert (numbers == places.numbers_N).all()
            position = int(draw.integers(length))
            assert order.counts_before(position + 1) == tuple(counts[position].tolist())


def test_sources_that_lack_a_part_have_it_before_their_weights_change() -> None:
    slow = [1 / 40] * 40
    for first in range(1, 40):  # both fast sources lack up to 0.98 of a sequence if they are not among the first
        fast = [1.0, 1.0, *[0.0] * 38]
        sources_N = MixOrder([(0, slow), (first, fast)]).places(0, first + 40).sources_N
        counts = np.cumsum(sources_N[:, None] == np.arange(40), axis=0)
        rates = np.array([[*slow]] * first + [[0.5, 0.5, *[0.0] * 38]] * 40)
        assert np.abs(counts - np.cumsum(rates, axis=0)).max() < 1 + 1e-6
        assert (sources_N[first + 4 :] < 2).all()


@pytest.mark.parametrize("first", [0, 777, 3_600_000_000])
def test_any_part_of_the_order_can_be_read_alone(first: int) -> None:
    draw = np.random.default_rng(1)
    phases = phases_of(draw, 7, 3)
    whole = MixOrder(phases).places(first, 600)
    assert 0 not in np.bincount(whole.sources_N, minlength=2)[:1]
    order = MixOrder(phases)
    for size in (1, 7, 64, 599):
        for start in draw.integers(0, 601 - size, 5).tolist():
            part = order.places(first + start, size)
            assert (part.sources_N == whole.sources_N[start : start + size]).all()
            assert (part.numbers_N == whole.numbers_N[start : start + size]).all()
    shuffled = draw.permutation(600)
    assert (order.at(first + shuffled).numbers_N == whole.numbers_N[shuffled]).all()


def test_an_order_of_billions_of_sequences_takes_less_than_a_mebibyte() -> None:
    tracemalloc.start()
    order = MixOrder([(0, [0.55, 0.3, 0.15, 2**-0.5])])
    places = order.places(3_600_000_000 - 4000, 4000)
    KeyedPermutation(3_600_000_000, "a")(places.numbers_N)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 4096, 4097])
def test_a_permutation_is_one_and_depends_on_its_key(size: int) -> None:
    images = KeyedPermutation(size, "a")(np.arange(size))
    assert sorted(images.tolist()) == list(range(size))
    if size > 5:
        assert (images != KeyedPermutation(size, "b")(np.arange(size))).mean() > 0.7


def test_a_permutation_spreads_its_numbers_and_stays_the_same() -> None:
    assert KeyedPermutation(10, "a")(np.arange(10)).tolist() == [3, 0, 7, 4, 8, 2, 6, 1, 9, 5]
    size = 3_600_000_000
    images = KeyedPermutation(size, "b")(np.arange(50_000)) / size
    # A correlation of independent numbers is within 5 / sqrt(50,000) of 0.
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 0.023
    assert abs(np.corrcoef(images, np.arange(50_000))[0, 1]) < 0.023
    assert np.abs(np.histogram(images, 10, (0, 1))[0] - 5000).max() < 350
