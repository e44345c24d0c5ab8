"""Files of JSON objects, one a line, as a run leaves them: read line by line, whatever is in them. No torch here."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

LONGEST_LINE_BYTES = 2**24
_LARGEST_STEP = 2**53


def raw_lines(path: Path) -> Iterator[bytes]:
    """Yields the lines of a file; none if it is no regular file.

    A line longer than `LONGEST_LINE_BYTES` ends the reading: it is none that a run wrote.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        while line := file.readline(LONGEST_LINE_BYTES):
            if len(line) == LONGEST_LINE_BYTES:
                return
            yield line


def read_line(line: bytes) -> dict[str, Any] | None:
    """Returns the object that a line holds, or None if it holds none with a step."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return record if type(step) is int and 0 <= step < _LARGEST_STEP else None


def number_of(record: Mapping[str, Any], key: str) -> float | None:
    """Returns a number of a line's object, or None if it holds none under the key."""
    value = record.get(key)
    if type(value) is int and abs(value) <= _LARGEST_STEP:
        return float(value)
    return value if type(value) is float else None


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the objects of a file, the oldest first; lines that are not whole are left out."""
    for line in raw_lines(path):
        if line.endswith(b"\n") and (record := read_line(line)) is not None:
            yield record
