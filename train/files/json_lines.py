"""Writes and reads files with one JSON object per line, such as `metrics.jsonl`. No torch here."""

import json
import logging
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from base.files import replacing
from base.journal import append
from train.files.run_files import redact

LOGGER = logging.getLogger("train")
METRICS_NAME = "metrics.jsonl"
LOADS_NAME = "loads.jsonl"
EVENTS_NAME = "events.jsonl"
MICRO_BATCH_LOADS = "micro_batch_loads"
"""Files of a run's folder: records of steps, loads of experts, events other than steps, and the ranks' loads."""
LONGEST_LINE_BYTES = 2**24
_LARGEST_STEP = 2**53
_MOST_WAITING = 10_000


class JsonLines:
    """A file to which lines are appended, each completely or not at all.

    A run that resumes in its own folder after `first_step` steps removes the lines of later steps. Lines that a full
    disk refuses are kept in memory and written with the next one. A failure is logged once.
    """

    def __init__(self, path: Path, first_step: int) -> None:
        self._path = path
        self._waiting: list[str] = []
        self._has_failed = False
        self._file = self._open(first_step)

    def record(self, values: Mapping[str, Any]) -> None:
        """Appends a line."""
        self._waiting = [*self._waiting, json.dumps(values) + "\n"][-_MOST_WAITING:]
        self._try_to_write()

    def roll_back(self, step: int) -> None:
        """Removes the lines of later steps."""
        self._try_to_write()
        self._waiting = [line for line in self._waiting if json.loads(line)["step"] <= step]
        try:
            again = self._open(step)
        except OSError as error:
            self._log_failure(error)
            return
        self._file.close()
        self._file = again

    def amend(self, values: Mapping[str, Any]) -> None:
        """Replaces the last line atomically."""
        line = json.dumps(values) + "\n"
        if self._waiting:
            self._waiting[-1] = line
            self._try_to_write()
            return
        try:
            self._put([*list(raw_lines(self._path))[:-1], line.encode()])
            again = self._path.open("ab", buffering=0)
        except OSError as error:
            self._log_failure(error)
            return
        self._file.close()
        self._file = again

    def last(self) -> dict[str, Any] | None:
        """Returns the object of the last line, or None if the file is empty."""
        newest = deque(read_lines(self._path), maxlen=1)
        return newest[0] if newest else None

    def close(self) -> None:
        """Closes the file."""
        if self._waiting:
            self._try_to_write()
        self._file.close()

    def _try_to_write(self) -> None:
        try:
            append(self._file, "".join(self._waiting).encode())
        except OSError as error:
            self._log_failure(error)
        else:
            self._waiting = []

    def _log_failure(self, error: OSError) -> None:
        if not self._has_failed:
            LOGGER.warning("%s cannot be written; its lines are kept in memory: %s", self._path, error)
        self._has_failed = True

    def _open(self, last_step: int) -> FileIO:
        kept_bytes = sum(len(line) for line in _lines_until(self._path, last_step))
        if self._path.exists() and kept_bytes < self._path.stat().st_size:
            self._put(_lines_until(self._path, last_step))
        return self._path.open("ab", buffering=0)

    def _put(self, lines: Iterable[bytes]) -> None:
        with replacing(self._path) as partial, partial.open("wb") as file:
            file.writelines(lines)


def _lines_until(path: Path, last_step: int) -> Iterator[bytes]:
    """Yields the complete lines of steps up to `last_step`."""
    for line in raw_lines(path):
        record = read_line(line) if line.endswith(b"\n") else None
        if record is not None and record["step"] <= last_step:
            yield line


def raw_lines(path: Path) -> Iterator[bytes]:
    """Yields the lines of a regular file until one is longer than any that a run writes."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        while line := file.readline(LONGEST_LINE_BYTES):
            if len(line) == LONGEST_LINE_BYTES:
                return
            yield line


def read_line(line: bytes) -> dict[str, Any] | None:
    """Returns the object of a line, or None if the line is invalid or has no step."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return record if type(step) is int and 0 <= step < _LARGEST_STEP else None


def number_of(record: Mapping[str, Any], key: str) -> float | None:
    """Returns a number from a line's object, or None if the key has no number."""
    value = record.get(key)
    if type(value) is int and abs(value) <= _LARGEST_STEP:
        return float(value)
    return value if type(value) is float else None


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the objects of a file, the oldest first. Incomplete and invalid lines are left out."""
    for line in raw_lines(path):
        if line.endswith(b"\n") and (record := read_line(line)) is not None:
            yield record


def append_event(out_dir: Path, kind: str, step: int, text: str, **values: Any) -> None:
    """Appends an event to the file.

    Args:
        kind: kind of event: `skipped`, `rolled_back`, `skipped_after_rollback`, `stopped`, `preempted`, `restarted`,
            `checkpoint_rejected`, `lock_taken_over`, `folder_lost`, `output_broken`, `rescued`, `no_verdict`.
        step: number of the step, from 1, as in `metrics.jsonl`; the last one done if the event belongs to no step.
    """
    line = json.dumps(
        {"time": time.time(), "kind": kind, "step": step, "text": redact(text), **values}, allow_nan=False
    )
    with (out_dir / EVENTS_NAME).open("ab+") as file:
        # A killed process or a full disk may have left an incomplete line, which the new one must not continue.
        if file.tell():
            file.seek(-1, os.SEEK_END)
            line = line if file.read() == b"\n" else f"\n{line}"
        file.write(f"{line}\n".encode())


def try_append_event(out_dir: Path, kind: str, step: int, text: str, **values: Any) -> None:
    """Appends an event like `append_event`, or logs it if the file cannot be written."""
    try:
        append_event(out_dir, kind, step, text, **values)
    except OSError as error:
        LOGGER.warning("%s: %s; cannot be written to %s: %s", kind, text, EVENTS_NAME, error)


def read_events(out_dir: Path) -> list[dict[str, Any]]:
    """Returns all events, the oldest first. Incomplete lines and lines without kind or step are left out."""
    return [event for event in read_lines(out_dir / EVENTS_NAME) if isinstance(event.get("kind"), str)]
