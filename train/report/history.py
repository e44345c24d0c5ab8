"""Numbers of a run of any length, in a limited number of buckets of consecutive steps.

Shape legend: N buckets, S statistics of a number, K numbers.
"""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MOST_BUCKETS = 400
_COUNT, _TOTAL, _LEAST, _MOST, _LATEST = range(5)
_EMPTY_S1 = np.array([[0.0], [0.0], [np.inf], [-np.inf], [np.nan]])
Loads = dict[str, NDArray[np.float64]]


@dataclass(frozen=True, slots=True)
class BucketStatistics:
    """Statistics of one number in each bucket: [N] each, NaN in buckets that have no value of it."""

    count_N: NDArray[np.float64]
    total_N: NDArray[np.float64]
    least_N: NDArray[np.float64]
    most_N: NDArray[np.float64]
    latest_N: NDArray[np.float64]

    @property
    def mean_N(self) -> NDArray[np.float64]:
        """Mean over the steps of each bucket that recorded the number."""
        return self.total_N / self.count_N


class History:
    """Buckets of equal width. If there would be too many, neighbors are merged in pairs."""

    def __init__(self, most_buckets: int = MOST_BUCKETS) -> None:
        self.firsts: list[int] = []
        self.lasts: list[int] = []
        self.loads: list[Loads] = []
        self.width = 1
        self._filled = 0
        self._columns: dict[str, int] = {}
        self._stats_NSK = np.repeat(_EMPTY_S1[None], most_buckets, axis=0)

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """Adds a step's finite numbers, and first removes what was added from that step on."""
        while self.lasts and self.lasts[-1] >= step:
            for steps in (self.firsts, self.lasts, self.loads):
                steps.pop()
            self._filled = self.width
        all_columns = [self._columns.setdefault(key, len(self._columns)) for key in numbers]
        values = np.fromiter(numbers.values(), dtype=np.float64, count=len(all_columns))
        missing = len(self._columns) - self._stats_NSK.shape[2]
        if missing > 0:
            empty_NSK = np.broadcast_to(_EMPTY_S1, (len(self._stats_NSK), len(_EMPTY_S1), missing))
            self._stats_NSK = np.concatenate([self._stats_NSK, empty_NSK], axis=2)
        row_SK = np.repeat(_EMPTY_S1, self._stats_NSK.shape[2], axis=1)
        is_finite = np.isfinite(values)
        columns = np.array(all_columns, dtype=np.intp)[is_finite]
        row_SK[:, columns] = values[is_finite]
        row_SK[_COUNT, columns] = 1.0
        self._append(step, row_SK)

    def _append(self, step: int, row_SK: NDArray[np.float64]) -> None:
        if self.lasts and self._filled < self.width:
            last = len(self.lasts) - 1
            self._stats_NSK[last] = _joined(self._stats_NSK[last], row_SK)
            self.lasts[-1] = step
            self._filled += 1
            return
        if len(self.lasts) == len(self._stats_NSK):
            self._stats_NSK[: len(self.lasts) // 2] = _joined(self._stats_NSK[::2], self._stats_NSK[1::2])
            self.firsts = self.firsts[::2]
            self.lasts = self.lasts[1::2]
            for earlier, later in zip(self.loads[::2], self.loads[1::2], strict=True):
                _add_loads(earlier, later)
            self.loads = self.loads[::2]
            self.width *= 2
        self._stats_NSK[len(self.lasts)] = row_SK
        self.firsts.append(step)
        self.lasts.append(step)
        self.loads.append({})
        self._filled = 1

    def add_loads(self, step: int, loads: Loads) -> None:
        """Adds loads of experts by layer. A step whose numbers were not added is ignored."""
        bucket = bisect_right(self.firsts, step) - 1
        if bucket >= 0 and step <= self.lasts[bucket]:
            _add_loads(self.loads[bucket], loads)

    @property
    def keys(self) -> list[str]:
        """Dotted keys of all finite numbers, in the order in which they were first recorded."""
        counts_K = self._stats_NSK[: len(self.lasts), _COUNT].sum(axis=0)
        return [key for key, column in self._columns.items() if counts_K[column]]

    def statistics(self, key: str) -> BucketStatistics | None:
        """Returns a number's statistics in each bucket, or None if it was never recorded."""
        column = self._columns.get(key)
        if column is None or not self._stats_NSK[: len(self.lasts), _COUNT, column].any():
            return None
        stats_SN = self._stats_NSK[: len(self.lasts), :, column].T
        return BucketStatistics(*np.where(stats_SN[_COUNT] > 0, stats_SN, np.nan))

    def latest(self, key: str) -> float | None:
        """Returns the last value of a number."""
        numbers = self.statistics(key)
        return None if numbers is None else float(numbers.latest_N[np.isfinite(numbers.latest_N)][-1])

    def layers(self) -> list[str]:
        """Returns the layers with known loads, by number."""
        layers = {layer for loads in self.loads for layer in loads}
        return sorted(layers, key=lambda layer: (len(layer), layer))


def _joined(earlier: NDArray[np.float64], later: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the statistics of buckets that follow one another: [..., S, K]."""
    return np.stack(
        [
            earlier[..., _COUNT, :] + later[..., _COUNT, :],
            earlier[..., _TOTAL, :] + later[..., _TOTAL, :],
            np.minimum(earlier[..., _LEAST, :], later[..., _LEAST, :]),
            np.maximum(earlier[..., _MOST, :], later[..., _MOST, :]),
            np.where(later[..., _COUNT, :] > 0, later[..., _LATEST, :], earlier[..., _LATEST, :]),
        ],
        axis=-2,
    )


def _add_loads(sums: Loads, loads: Loads) -> None:
    """Adds loads in place; a row with another number of experts than before replaces it."""
    for layer, row in loads.items():
        before = sums.get(layer)
        sums[layer] = row if before is None or before.shape != row.shape else before + row
