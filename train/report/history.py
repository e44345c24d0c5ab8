"""A run's numbers, however long it was, in a limited number of buckets of consecutive steps."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

MOST_BUCKETS = 400


@dataclass(slots=True)
class Tally:
    """What a number was in the steps of a bucket."""

    count: int
    total: float
    least: float
    most: float
    latest: float

    @property
    def mean(self) -> float:
        """Over the steps that told it."""
        return self.total / self.count

    def joined(self, later: "Tally") -> "Tally":
        """Both buckets' steps."""
        return Tally(
            count=self.count + later.count,
            total=self.total + later.total,
            least=min(self.least, later.least),
            most=max(self.most, later.most),
            latest=later.latest,
        )


@dataclass(slots=True)
class Bucket:
    """Consecutive steps: the first and the last, tallies by dotted key, summed loads of experts by layer."""

    first: int
    last: int
    tallies: dict[str, Tally] = field(default_factory=dict)
    loads: dict[str, NDArray[np.float64]] = field(default_factory=dict)

    def join(self, later: "Bucket") -> None:
        """Takes in the bucket that follows."""
        self.last = later.last
        for key, tally in later.tallies.items():
            mine = self.tallies.get(key)
            self.tallies[key] = tally if mine is None else mine.joined(tally)
        for layer, loads in later.loads.items():
            self.loads[layer] = loads + self.loads.get(layer, 0.0)


class History:
    """Buckets of equal width; where there would be too many, every two become one."""

    def __init__(self, most_buckets: int = MOST_BUCKETS) -> None:
        """An empty one, of at most so many buckets (an even number)."""
        self.buckets: list[Bucket] = []
        self.width = 1
        self._most = most_buckets
        self._filled = 0

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """Notes numbers of a step. A step that is not after the last one takes back what was noted from it on.

        Numbers that are not finite are left out.
        """
        if self.buckets and step <= self.buckets[-1].last:
            self._take_back(step)
        finite = {key: value for key, value in numbers.items() if math.isfinite(value)}
        self._append(Bucket(step, step, {key: Tally(1, value, value, value, value) for key, value in finite.items()}))

    def add_loads(self, step: int, loads: Mapping[str, Sequence[float]]) -> None:
        """Notes loads of experts by layer, of a step whose numbers are noted; others are passed over."""
        for bucket in reversed(self.buckets):
            if bucket.first <= step <= bucket.last:
                of_step = {layer: np.asarray(row, dtype=np.float64) for layer, row in loads.items()}
                bucket.join(Bucket(bucket.first, bucket.last, loads=of_step))
                return

    def tallies(self, key: str) -> list[tuple[Bucket, Tally]]:
        """The buckets that know a number, in order."""
        return [(bucket, bucket.tallies[key]) for bucket in self.buckets if key in bucket.tallies]

    def latest(self, key: str) -> float | None:
        """A number's last value."""
        known = self.tallies(key)
        return known[-1][1].latest if known else None

    def median(self, key: str) -> float | None:
        """The median of the buckets' means."""
        known = [tally.mean for _, tally in self.tallies(key)]
        return float(np.median(known)) if known else None

    def layers(self) -> list[str]:
        """Those whose loads are known, by number."""
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

    def _take_back(self, step: int) -> None:
        while self.buckets and self.buckets[-1].last >= step:
            self.buckets.pop()
        self._filled = self.width
