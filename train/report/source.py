"""What a run's folder tells a report, read anew as the run goes on: only what was added since the last time."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.checkpoint.locate import CHECKPOINTS_NAME
from train.checkpoint.manifest import MANIFEST_NAME
from train.records.json_lines import LONGEST_LINE_BYTES, number_of, read_line
from train.report.chart import Mark
from train.report.history import History

METRICS_NAME, LOADS_NAME, EVENTS_NAME, PICTURE_NAME = "metrics.jsonl", "loads.jsonl", "events.jsonl", "schedule.svg"
_LARGEST_PICTURE_BYTES = 2**26
_DRAWN_ELEMENTS = frozenset(
    ("svg", "g", "rect", "line", "path", "text", "tspan", "title", "style", "defs", "pattern", "circle", "polyline")
)


class RunSource:
    """The folder of a run, at work or ended."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.history = History()
        self.last: Mapping[str, Any] = {}
        self._metrics = _Tail(folder / METRICS_NAME)
        self._loads = _Tail(folder / LOADS_NAME)

    def follow(self) -> None:
        """Takes in what was written since; all of it where a file was written anew."""
        if self._metrics.is_new() or self._loads.is_new():
            self.history, self.last = History(), {}
            self._metrics.rewind()
            self._loads.rewind()
        for record in self._metrics.records():
            self.history.add(record["step"], dict(_numbers(record, "")))
            self.last = record
        for record in self._loads.records():
            self.history.add_loads(record["step"], {key: row for key, row in record.items() if _are_numbers(row)})

    def marks(self) -> list[Mark]:
        """Events and whole checkpoints, by step."""
        events = [
            Mark(step=record["step"], kind=str(record.get("kind", "event")), text=str(record.get("text", "")))
            for record in _Tail(self.folder / EVENTS_NAME).records()
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
        """Returns planned and measured time of the pipeline as SVG; empty if there is no picture of shapes alone."""
        path = self.folder / PICTURE_NAME
        if not path.is_file() or path.stat().st_size > _LARGEST_PICTURE_BYTES:
            return ""
        text = path.read_text(encoding="utf-8", errors="replace")
        return text if _is_only_drawn(text) else ""


@dataclass(slots=True)
class _Tail:
    """A file of JSON objects, one a line, that grows. A line that is not whole, or has no step, is passed over."""

    path: Path
    offset: int = 0
    identity: int = 0

    def is_new(self) -> bool:
        """Whether another file has taken its place, or it has lost lines."""
        if not self.path.is_file():
            return self.offset > 0
        found = self.path.stat()
        return self.offset > 0 and (found.st_ino != self.identity or found.st_size < self.offset)

    def rewind(self) -> None:
        """Begins anew."""
        self.offset = 0

    def records(self) -> Iterator[dict[str, Any]]:
        """Objects of the lines since the last call."""
        if not self.path.is_file():
            return
        with self.path.open("rb") as file:
            self.identity = self.path.stat().st_ino
            file.seek(self.offset)
            while (line := file.readline(LONGEST_LINE_BYTES)).endswith(b"\n"):
                self.offset += len(line)
                if (record := read_line(line)) is not None:
                    yield record


def _numbers(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    """Numbers by dotted key. Of the exchange's layers the last step alone is shown."""
    for key, value in values.items():
        if isinstance(value, dict) and key != "exchange":
            yield from _numbers(value, f"{prefix}{key}.")
        elif (number := number_of(values, key)) is not None:
            yield f"{prefix}{key}", number


def _are_numbers(row: object) -> bool:
    return isinstance(row, list) and all(type(value) in (int, float) and abs(value) < 2**53 for value in row)


def _is_only_drawn(text: str) -> bool:
    """Whether a picture has shapes and text alone: the page would run a script that somebody put into it."""
    elements = {found.lower() for found in re.findall(r"<\s*/?\s*([^\s/>]*)", text)}
    return elements <= _DRAWN_ELEMENTS and not re.search(
        r"\bon\w+\s*=|href|url\(\s*[^#\s]|@import", text, re.IGNORECASE
    )
