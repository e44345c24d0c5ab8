"""Reads a run's folder for its report, incrementally: only what was added since the last time.

The history of a run of any length has a limited number of buckets of consecutive steps.

Shape legend: N buckets, S statistics of a number, K numbers.
"""

import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from base.decode import flatten
from train.checkpoint.locate import CHECKPOINTS_NAME
from train.checkpoint.manifest import MANIFEST_NAME
from train.files.json_lines import EVENTS_NAME, LOADS_NAME, LONGEST_LINE_BYTES, METRICS_NAME, number_of, read_line

PICTURE_NAME = "schedule.svg"
_LARGEST_PICTURE_BYTES = 2**26
_LOADS_PER_BUCKET = 4
_MOST_STEP_BYTES = 2**26
"""Size of the end of `metrics.jsonl` from which typical steps are read."""
_LARGEST_NUMBER = 2**53
_TABLE_KEY = "exchange"
"""Table of a metrics line by layer, most of its bytes; a report shows only that of the last step."""
_DRAWN_ELEMENTS = frozenset(
    ("svg", "g", "rect", "line", "path", "text", "tspan", "title", "style", "defs", "pattern", "circle", "polyline")
)
MOST_BUCKETS = 400
_COUNT, _TOTAL, _LEAST, _MOST, _LATEST = range(5)
_EMPTY_S1 = np.array([[0.0], [0.0], [np.inf], [-np.inf], [np.nan]])
Loads = dict[str, NDArray[np.float64]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """An event of a step. `kind` is a style: `checkpoint`, or any other kind for an event."""

    step: int
    kind: str
    text: str


class RunSource:
    """The folder of a run, at work or ended."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.history = History()
        self._last_line = b""
        self._metrics = _Tail(folder / METRICS_NAME)
        self._loads = _Tail(folder / LOADS_NAME)

    @property
    def last(self) -> Mapping[str, Any]:
        """The whole record of the last step; empty before the first."""
        return read_line(self._last_line) or {}

    def follow(self) -> None:
        """Reads what was added since the last call, or everything if a file was replaced."""
        if self._metrics.is_new() or self._loads.is_new():
            self.history = History()
            self._last_line = b""
            self._metrics.rewind()
            self._loads.rewind()
        for line in self._metrics.lines():
            if (record := read_line(line)) is not None:
                self.history.add(record["step"], dict(_numbers(record)))
                self._last_line = line
        for line in self._loads.lines():
            if _is_sampled(self._loads.num_lines) and (record := read_line(line)) is not None:
                self.history.add_loads(record["step"], read_loads(record))

    def marks(self) -> list[Mark]:
        """Events and whole checkpoints, by step."""
        events = [
            Mark(step=record["step"], kind=str(record.get("kind", "event")), text=str(record.get("text", "")))
            for line in _Tail(self.folder / EVENTS_NAME).lines()
            if (record := read_line(line)) is not None
        ]
        folders = sorted((self.folder / CHECKPOINTS_NAME).glob(f"step-*/{MANIFEST_NAME}"))
        steps = [(path.parent, path.parent.name.removeprefix("step-")) for path in folders]
        checkpoints = [
            Mark(step=int(step), kind="checkpoint", text=path.relative_to(self.folder).as_posix())
            for path, step in steps
            if step.isdigit()
        ]
        return sorted([*events, *checkpoints], key=lambda mark: mark.step)

    def picture(self) -> str:
        """Returns planned and measured time of the pipeline as SVG, if there is a picture of shapes alone."""
        path = self.folder / PICTURE_NAME
        if not path.is_file() or path.stat().st_size > _LARGEST_PICTURE_BYTES:
            return ""
        text = path.read_text(encoding="utf-8", errors="replace")
        # The page has the style of pictures, and its policy allows no other.
        return re.sub(r"(?s)<style>.*?</style>", "", text) if _is_only_drawn(text) else ""


@dataclass(slots=True)
class _Tail:
    """A growing file of JSON objects, one a line; incomplete lines and lines without step are skipped."""

    path: Path
    offset: int = 0
    num_lines: int = 0
    identity: int = 0

    def is_new(self) -> bool:
        """Whether another file has taken its place, or it has lost lines."""
        if not self.path.is_file():
            return self.offset > 0
        status = self.path.stat()
        return self.offset > 0 and (status.st_ino != self.identity or status.st_size < self.offset)

    def rewind(self) -> None:
        self.offset = self.num_lines = 0

    def last_lines(self, most_bytes: int) -> Iterator[bytes]:
        """Yields the lines of the end of the file."""
        if self.path.is_file() and (skipped := self.path.stat().st_size - most_bytes) > 0:
            with self.path.open("rb") as file:
                file.seek(skipped)
                file.readline(LONGEST_LINE_BYTES)
                self.offset = file.tell()
        yield from self.lines()

    def lines(self) -> Iterator[bytes]:
        if not self.path.is_file():
            return
        with self.path.open("rb") as file:
            self.identity = self.path.stat().st_ino
            file.seek(self.offset)
            while (line := file.readline(LONGEST_LINE_BYTES)).endswith(b"\n"):
                self.offset += len(line)
                self.num_lines += 1
                yield line


def _numbers(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yields the numbers of nested objects by dotted key, without the table of the exchange."""
    for key, value in flatten({key: value for key, value in record.items() if key != _TABLE_KEY}):
        if type(value) is float or (type(value) is int and abs(value) <= _LARGEST_NUMBER):
            yield key, value


def read_loads(record: Mapping[str, Any]) -> Loads:
    """Returns the loads of each layer's experts in a line of `loads.jsonl`, if they are numbers."""
    loads = {}
    for layer, row in record.items():
        try:
            numbers = np.array(row if isinstance(row, list) else [])
        except ValueError:  # rows of unequal lengths
            continue
        if numbers.ndim == 1 and numbers.dtype.kind in "iuf" and len(numbers) and abs(numbers).max() < _LARGEST_NUMBER:
            loads[layer] = numbers.astype(np.float64)
    return loads


def _is_sampled(number: int) -> bool:
    """Returns whether a line of loads is read: all at first, then `_LOADS_PER_BUCKET` or more per bucket.

    A line has the load of every expert, and their decoding would be most of a report's time. The choice depends only
    on the number of the line, so that a report is the same whether it is drawn during the run or after it.
    """
    stride = 1 << (number // (MOST_BUCKETS * _LOADS_PER_BUCKET)).bit_length()
    return (number - 1) % stride == 0


def _is_only_drawn(text: str) -> bool:
    """Whether a picture has shapes and text alone: the page would run a script that somebody put into it."""
    elements = {name.lower() for name in re.findall(r"<\s*/?\s*([^\s/>]*)", text)}
    return elements <= _DRAWN_ELEMENTS and not re.search(
        r"\bon\w+\s*=|href|url\(\s*[^#\s]|@import", text, re.IGNORECASE
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordedStep:
    """The time of one step in seconds, as means over all ranks, and the largest peak memory so far.

    `outside` is the time outside the passes: optimizer, data, agreement of the ranks, rollouts.
    """

    number: int
    sequences: int
    step: float
    exposed_exchange: float
    bubble: float
    outside: float
    peak_memory_bytes: int


def typical_steps(folder: Path) -> tuple[RecordedStep, ...]:
    """Returns the recorded steps of the largest batch, the oldest first.

    The run's first step, which takes longer, is left out if there are others. Of a long run only the last steps are
    read.
    """
    lines = _Tail(folder / METRICS_NAME).last_lines(_MOST_STEP_BYTES)
    steps = [step for line in lines if (step := _step_of(line)) is not None]
    largest = max((step.sequences for step in steps), default=0)
    steps = [step for step in steps if step.sequences == largest]
    return tuple(step for step in steps if step.number > 1) or tuple(steps)


def _step_of(line: bytes) -> RecordedStep | None:
    """Returns the step of a line; None if it is not a step with the parts of its time."""
    record = read_line(line)
    parts: Any = None if record is None else record.get("step_time")
    if record is None or not isinstance(parts, Mapping):
        return None
    numbers = [number_of(record, name) for name in ("step_seconds", "global_batch_sequences", "peak_memory_bytes")]
    numbers += [number_of(parts, f"{name}_seconds") for name in ("compute", "exposed_exchange", "bubble")]
    valid = [number for number in numbers if number is not None and 0 <= number < float("inf")]
    if len(valid) < len(numbers) or valid[0] <= 0:
        return None
    step, sequences, memory, compute, exposed, bubble = valid
    return RecordedStep(
        number=record["step"],
        sequences=int(sequences),
        step=step,
        exposed_exchange=exposed,
        bubble=bubble,
        outside=max(0.0, step - compute - exposed - bubble),
        peak_memory_bytes=int(memory),
    )


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
        """Adds loads of experts by layer. Ignores a step without added numbers."""
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
