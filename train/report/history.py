"""Numbers of a run of any length, in a limited number of buckets of consecutive steps.

Shape legend: S statistics of a number, K numbers.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

MOST_BUCKETS = 400
_COUNT, _TOTAL, _LEAST, _MOST, _LATEST = range(5)
_EMPTY = (0.0, 0.0, math.inf, -math.inf, math.nan)


@dataclass(frozen=True, slots=True)
class Tally:
    """Statistics of one number over the steps of a bucket."""

    count: int
    total: float
    least: float
    most: float
    latest: float

    @property
    def mean(self) -> float:
        """Mean over the steps that recorded the number."""
        return self.total / self.count


@dataclass(slots=True)
class Bucket:
    """Consecutive steps.

    Attributes:
        first: first step.
        last: last step.
        stats_SK: statistics of every number: count, sum, least, most, latest by the column of the number.
        loads: summed loads of experts by layer.
    """

    first: int
    last: int
    stats_SK: NDArray[np.float64]
    loads: dict[str, NDArray[np.float64]] = field(default_factory=dict)

    def join(self, later: "Bucket") -> None:
        """Adds the bucket that follows."""
        self.last = later.last
        mine_SK, later_SK = _of_equal_width(self.stats_SK, later.stats_SK)
        has_later_K = later_SK[_COUNT] > 0
        mine_SK[_COUNT] += later_SK[_COUNT]
        mine_SK[_TOTAL] += later_SK[_TOTAL]
        np.minimum(mine_SK[_LEAST], later_SK[_LEAST], out=mine_SK[_LEAST])
        np.maximum(mine_SK[_MOST], later_SK[_MOST], out=mine_SK[_MOST])
        np.copyto(mine_SK[_LATEST], later_SK[_LATEST], where=has_later_K)
        self.stats_SK = mine_SK
        self.add_loads(later.loads)

    def add_loads(self, loads: Mapping[str, NDArray[np.float64]]) -> None:
        """Adds loads of experts; a row with another number of experts than before replaces it."""
        for layer, row in loads.items():
            known = self.loads.get(layer)
            self.loads[layer] = row if known is None or known.shape != row.shape else known + row


class History:
    """Buckets of equal width. If there would be too many, neighbors are merged in pairs."""

    def __init__(self, most_buckets: int = MOST_BUCKETS) -> None:
        """Starts empty.

        Args:
            most_buckets: largest number of buckets, even.
        """
        self.buckets: list[Bucket] = []
        self.width = 1
        self._most = most_buckets
        self._filled = 0
        self._columns: dict[str, int] = {}
        self._last_keys: list[str] = []
        self._last_columns: NDArray[np.intp] = np.empty(0, dtype=np.intp)

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """Adds the numbers of a step.

        A step that is not after the last one first removes what was added from it on. Numbers that are not finite are
        left out.
        """
        if self.buckets and step <= self.buckets[-1].last:
            self._remove_from(step)
        keys = list(numbers)
        if keys != self._last_keys:  # almost all steps record the same numbers
            self._last_columns = np.array(
                [self._columns.setdefault(key, len(self._columns)) for key in keys], dtype=np.intp
            )
            self._last_keys = keys
        row_K = np.full(len(self._columns), np.nan)
        row_K[self._last_columns] = np.fromiter(numbers.values(), dtype=np.float64, count=len(keys))
        self._append(Bucket(step, step, _stats_of(row_K)))

    def add_loads(self, step: int, loads: Mapping[str, NDArray[np.float64]]) -> None:
        """Adds loads of experts by layer. A step whose numbers were not added is ignored."""
        place = bisect_right(self.buckets, step, key=lambda bucket: bucket.first) - 1
        if place >= 0 and step <= self.buckets[place].last:
            self.buckets[place].add_loads(loads)

    @property
    def keys(self) -> list[str]:
        """Dotted keys of all numbers, in the order in which they were first recorded."""
        return list(self._columns)

    def tallies(self, key: str) -> list[tuple[Bucket, Tally]]:
        """Returns the buckets that hold a number, in order."""
        column = self._columns.get(key)
        if column is None:
            return []
        held = [bucket for bucket in self.buckets if column < bucket.stats_SK.shape[1]]
        rows = [(bucket, bucket.stats_SK[:, column].tolist()) for bucket in held]
        return [(bucket, Tally(int(count), *others)) for bucket, (count, *others) in rows if count]

    def latest(self, key: str) -> float | None:
        """Returns the last value of a number."""
        known = self.tallies(key)
        return known[-1][1].latest if known else None

    def median(self, key: str) -> float | None:
        """Returns the median of a number's means in the buckets."""
        known = [tally.mean for _, tally in self.tallies(key)]
        return float(np.median(known)) if known else None

    def layers(self) -> list[str]:
        """Returns the layers with known loads, by number."""
        known = {layer for bucket in self.buckets for layer in bucket.loads}
        return sorted(known, key=lambda layer: (len(layer), layer))

    def _append(self, bucket: Bucket) -> None:
        if self.buckets and self._filled < self.width:
            self.buckets[-1].join(bucket)
            self._filled += 1
            return
        if len(self.buckets) == self._most:
            for place in range(0, self._most, 2):
                self.buckets[place].join(self.buckets[place + 1])
            del self.buckets[1::2]
            self.width *= 2
        self.buckets.append(bucket)
        self._filled = 1

    def _remove_from(self, step: int) -> None:
        while self.buckets and self.buckets[-1].last >= step:
            self.buckets.pop()
        self._filled = self.width


def _stats_of(row_K: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the statistics of one step: [S, K]."""
    is_known_K = np.isfinite(row_K)
    stats_SK = np.empty((len(_EMPTY), len(row_K)))
    stats_SK[_COUNT] = is_known_K
    for row, without in zip(stats_SK[_TOTAL:], _EMPTY[_TOTAL:], strict=True):
        row[:] = np.where(is_known_K, row_K, without)
    return stats_SK


def _of_equal_width(
    mine_SK: NDArray[np.float64], later_SK: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns both statistics with as many columns as the wider has."""
    width = max(mine_SK.shape[1], later_SK.shape[1])
    return _widened(mine_SK, width), _widened(later_SK, width)


def _widened(stats_SK: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    missing = width - stats_SK.shape[1]
    if not missing:
        return stats_SK
    return np.concatenate([stats_SK, np.repeat(np.array(_EMPTY)[:, None], missing, axis=1)], axis=1)
