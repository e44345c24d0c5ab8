"""Estimates metrics with their standard errors, and compares two evaluations. Imports no torch."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from evaluation.protocol import Measure

NUM_RESAMPLES = 4000


def group_by(records: Sequence[Mapping[str, Any]], *names: str) -> dict[Any, list[Mapping[str, Any]]]:
    """Returns records by the value of a field, or by a tuple of the values of several."""
    groups = defaultdict[Any, list[Mapping[str, Any]]](list)
    for record in records:
        values = tuple(record[name] for name in names)
        groups[values if len(names) > 1 else values[0]].append(record)
    return dict(groups)


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A metric, None without a sample, its standard error, None without two, and the number of samples."""

    value: float | None
    standard_error: float | None
    num_samples: int


def estimate(measures: Sequence[Measure]) -> Estimate:
    """Returns a ratio of sums over samples (a mean if weights are equal), with its standard error."""
    total = math.fsum(measure.value for measure in measures)
    weight = math.fsum(measure.weight for measure in measures)
    number = len(measures)
    if not weight:
        return Estimate(value=None, standard_error=None, num_samples=number)
    ratio = total / weight
    error = None
    if number > 1:
        squares = math.fsum((measure.value - ratio * measure.weight) ** 2 for measure in measures)
        error = math.sqrt(squares * number / (number - 1)) / weight
    return Estimate(value=ratio, standard_error=error, num_samples=number)


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedComparison:
    """Difference of a metric between two evaluations of the same samples: the first minus the second.

    The p-value is the probability of a difference at least as large if neither was better: of McNemar's exact test if
    all values are 0 or 1, or of a bootstrap. The interval of 95 % is that of the bootstrap, or follows from the
    standard error. Without two samples, there is neither error nor interval.
    """

    difference: float | None = None
    standard_error: float | None = None
    p_value: float | None = None
    test: Literal["mcnemar_exact", "paired_bootstrap"]
    interval: tuple[float, float] | None = None
    num_samples: int


def compare(first: Sequence[Measure], second: Sequence[Measure], seed: int = 0) -> PairedComparison:
    """Compares two evaluations of the same samples in the same order."""
    is_binary = all(measure.weight == 1 and measure.value in (0, 1) for measure in (*first, *second))
    compared = PairedComparison(test="mcnemar_exact" if is_binary else "paired_bootstrap", num_samples=len(first))
    ours = estimate(first).value
    theirs = estimate(second).value
    if ours is None or theirs is None:
        return compared
    difference = ours - theirs
    error = _paired_error(first, second, ours, theirs)
    p_value = interval = None
    if is_binary:
        gained = sum(left.value > right.value for left, right in zip(first, second, strict=True))
        lost = sum(left.value < right.value for left, right in zip(first, second, strict=True))
        p_value = mcnemar(gained, lost)
        interval = None if error is None else (difference - 1.96 * error, difference + 1.96 * error)
    elif len(first) > 1:
        p_value, interval = _bootstrap(first, second, seed)
    return replace(compared, difference=difference, standard_error=error, p_value=p_value, interval=interval)


_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 0.975 quantiles of 1, 2, ... degrees
MOST_PAIRED = len(_STUDENT) + 1


def mean_and_half_width(differences: Sequence[float]) -> tuple[float, float | None]:
    """Returns a mean and half the width of its interval of 95 % by Student's t; None for one difference.

    There may be at most `MOST_PAIRED` differences.
    """
    number = len(differences)
    mean = math.fsum(differences) / number
    if number < 2:
        return mean, None
    variance = math.fsum((difference - mean) ** 2 for difference in differences) / (number - 1)
    return mean, _STUDENT[number - 2] * math.sqrt(variance / number)


def mcnemar(gained: int, lost: int) -> float:
    """Returns the two-sided p-value of McNemar's exact test: a fair coin decides each sample that differs."""
    number = gained + lost
    tail = sum(math.comb(number, k) for k in range(min(gained, lost) + 1))
    return float(min(1.0, 2 * tail / 2**number))


def _paired_error(
    first: Sequence[Measure], second: Sequence[Measure], ratio: float, other_ratio: float
) -> float | None:
    number = len(first)
    if number < 2:
        return None
    weight = math.fsum(measure.weight for measure in first)
    other_weight = math.fsum(measure.weight for measure in second)
    squares = math.fsum(
        ((left.value - ratio * left.weight) / weight - (right.value - other_ratio * right.weight) / other_weight) ** 2
        for left, right in zip(first, second, strict=True)
    )
    return math.sqrt(squares * number / (number - 1))


def _bootstrap(first: Sequence[Measure], second: Sequence[Measure], seed: int) -> tuple[float, tuple[float, float]]:
    random = np.random.default_rng(seed)
    values = np.array(
        [(left.value, left.weight, right.value, right.weight) for left, right in zip(first, second, strict=True)]
    )
    sampled = []
    for _ in range(NUM_RESAMPLES):
        sums = values[random.integers(len(values), size=len(values))].sum(0)
        if sums[1] and sums[3]:
            sampled.append(sums[0] / sums[1] - sums[2] / sums[3])
    differences = np.array(sampled)
    # One more than counted, so that a finite number of resamples never gives a probability of 0.
    at_most = (1 + (differences <= 0).sum()) / (1 + len(differences))
    at_least = (1 + (differences >= 0).sum()) / (1 + len(differences))
    low, high = np.quantile(differences, (0.025, 0.975)).tolist()
    return min(1.0, float(2 * min(at_most, at_least))), (low, high)


class NoEstimateError(ValueError):
    """The samples do not determine a number."""


def wilson_interval(rate: float, number: int) -> tuple[float, float]:
    """Returns the interval of 95 % of a share of samples (E. B. Wilson, 1927). It is never empty."""
    square = 1.959964**2 / number
    center = (rate + square / 2) / (1 + square)
    width = math.sqrt(rate * (1 - rate) * square + square**2 / 4) / (1 + square)
    return center - width, center + width


LEAST_PAIRS = 30  # below that, the regression's intervals are not those of large samples


def length_controlled_rate(preferences: Sequence[float], differences: Sequence[float]) -> tuple[float, float, float]:
    """Returns the win rate at equal lengths, and its interval of 95 %.

    The logit of a preference is a + b tanh(d / s), given the difference d in length and the standard deviation s of all
    differences; the rate is that at d = 0. It is the model of AlpacaEval 2.0 (arXiv:2404.04475, equation 2) without its
    term for the difficulty of an instruction, which needs other systems' answers. The error is the robust one of
    maximum likelihood.

    Raises:
        NoEstimateError: there are too few pairs, equal preferences or lengths, or lengths that decide every preference.
    """
    number = len(preferences)
    if number < LEAST_PAIRS:
        raise NoEstimateError(f"needs at least {LEAST_PAIRS} pairs, there are {number}")
    if len(set(preferences)) == 1 or len(set(differences)) == 1:
        raise NoEstimateError("all pairs have the same preference or the same difference in length")
    deltas = np.asarray(differences, dtype=float)
    inputs_NK = np.column_stack([np.ones(number), np.tanh(deltas / deltas.std(ddof=1))])
    targets_N = np.asarray(preferences, dtype=float)
    weights_K = np.zeros(2)
    # Newton's method; the likelihood is concave.
    for _ in range(50):
        rates_N = 1 / (1 + np.exp(-inputs_NK @ weights_K))
        curvature_KK = inputs_NK.T @ (inputs_NK * (rates_N * (1 - rates_N))[:, None])
        errors_NK = inputs_NK * (targets_N - rates_N)[:, None]
        if abs(weights_K).max() > 30 or np.linalg.cond(curvature_KK) > 1e12:
            break
        step_K = np.linalg.solve(curvature_KK, errors_NK.sum(0))
        weights_K = weights_K + step_K
        if abs(step_K).max() < 1e-10:
            inverse_KK = np.linalg.inv(curvature_KK)
            error = math.sqrt((inverse_KK @ (errors_NK.T @ errors_NK) @ inverse_KK)[0, 0])
            logits = (weights_K[0], weights_K[0] - 1.959964 * error, weights_K[0] + 1.959964 * error)
            rate, low, high = (float(1 / (1 + np.exp(-logit))) for logit in logits)
            return rate, low, high
    raise NoEstimateError("the difference in length decides every preference")
