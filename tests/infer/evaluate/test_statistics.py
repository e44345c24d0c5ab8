"""Tests of standard errors and of paired tests."""

import math
import random

import pytest

from infer.evaluate.protocol import Measure
from infer.evaluate.statistics import compare, estimate, mcnemar


def test_mean_has_the_usual_standard_error() -> None:
    found = estimate([Measure(value=value) for value in (1.0, 0.0, 1.0, 1.0)])
    assert found.value == 0.75
    assert found.standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / 3))
    assert estimate([Measure(value=3.0)]).standard_error is None
    assert estimate([]).value is None


def test_ratio_weighs_samples() -> None:
    found = estimate([Measure(value=2.0, weight=4.0), Measure(value=9.0, weight=6.0), Measure(value=0.0, weight=0.0)])
    assert found.value == 1.1
    assert found.standard_error == pytest.approx(math.sqrt((2.4**2 + 2.4**2) * 3 / 2) / 10)


def test_mcnemar_is_the_exact_binomial_test() -> None:
    assert mcnemar(0, 0) == 1
    assert mcnemar(5, 5) == 1
    assert mcnemar(1, 8) == pytest.approx(2 * (1 + 9) / 2**9)
    assert mcnemar(8, 1) == mcnemar(1, 8)


def test_binary_measures_are_compared_by_mcnemar() -> None:
    first = [Measure(value=float(at < 14)) for at in range(20)]
    second = [Measure(value=float(at >= 13 or at < 2)) for at in range(20)]
    found = compare(first, second)
    assert (found.test, found.num_samples) == ("mcnemar_exact", 20)
    assert found.difference == pytest.approx(14 / 20 - 9 / 20)
    assert found.p_value == pytest.approx(mcnemar(11, 6))
    differences = [mine.value - other.value for mine, other in zip(first, second, strict=True)]
    assert found.standard_error == pytest.approx(estimate([Measure(value=each) for each in differences]).standard_error)


def test_bootstrap_finds_a_difference_only_if_there_is_one() -> None:
    chance = random.Random(2)
    weights = [chance.randint(100, 900) for _ in range(60)]
    second = [Measure(value=weight * chance.gauss(2, 0.3), weight=weight) for weight in weights]
    better = [Measure(value=each.value - each.weight * chance.gauss(0.1, 0.1), weight=each.weight) for each in second]
    noise = [Measure(value=each.value + each.weight * chance.gauss(0, 0.1), weight=each.weight) for each in second]
    found = compare(better, second)
    assert found.test == "paired_bootstrap"
    assert found.p_value is not None
    assert found.interval is not None
    assert found.p_value < 0.01
    assert found.interval[1] < 0
    assert found == compare(better, second)
    same = compare(noise, second)
    assert same.p_value is not None
    assert same.p_value > 0.05
    assert same.standard_error == pytest.approx(0.1 / math.sqrt(60), rel=0.5)
