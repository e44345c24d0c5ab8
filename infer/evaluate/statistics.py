"""Estimates metrics with their standard errors. Imports no torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from infer.evaluate.protocol import Measure


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A metric, its standard error and the number of samples.

    The value is None without a sample, and the standard error without two.
    """

    value: float | None
    standard_error: float | None
    num_samples: int


def estimate(measures: Sequence[Measure]) -> Estimate:
    """Returns a ratio of sums over samples, with the standard error of a ratio.

    With equal weights, these are the mean and the standard error of a mean.
    """
    total, weight, number = (
        math.fsum(each.value for each in measures),
        math.fsum(each.weight for each in measures),
        len(measures),
    )
    if not weight:
        return Estimate(value=None, standard_error=None, num_samples=number)
    ratio = total / weight
    error = None
    if number > 1:
        squares = math.fsum((each.value - ratio * each.weight) ** 2 for each in measures)
        error = math.sqrt(squares * number / (number - 1)) / weight
    return Estimate(value=ratio, standard_error=error, num_samples=number)
