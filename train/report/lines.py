"""Fast decoding of the lines that a report needs from `metrics.jsonl` and `loads.jsonl`.

A long run has gigabytes of them. A line that the fast way does not recognize is decoded as any JSON.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from train.records.json_lines import read_line

_LARGEST = 2**53
_TABLE_KEY = "exchange"
"""Per-layer table of a metrics line, most of its bytes; a report shows only that of the last step."""
_TABLE = re.compile(rb'"exchange": \{(?:"[^"\\]*": \{[^{}]*\}(?:, )?)*\}')
_HEAD = re.compile(rb'\{"step": (\d{1,16}), "([^"\\]+)": ')
_BETWEEN = re.compile(rb', "([^"\\]+)": ')
_COUNTS = re.compile(rb" ?\d{1,16}(?:, ?\d{1,16})*")
_END = b"}\n"


def read_numbers(line: bytes) -> tuple[int, dict[str, float]] | None:
    """Returns the step of a metrics line and its numbers by dotted key, without the table of the exchange.

    Args:
        line: whole line of `metrics.jsonl`.

    Returns:
        None if the line holds no step.
    """
    record = read_line(_TABLE.sub(b'"exchange": null', line, count=1)) or read_line(line)
    if record is None:
        return None
    found: dict[str, float] = {}
    _flatten(record, "", found)
    return record["step"], found


def read_loads(line: bytes) -> tuple[int, dict[str, NDArray[np.float64]]] | None:
    """Returns the step of a loads line and the loads of each layer's experts.

    Args:
        line: whole line of `loads.jsonl`.

    Returns:
        None if the line holds no step.
    """
    fast = _read_loads_fast(line)
    if fast is not None:
        return fast
    record = read_line(line)
    if record is None:
        return None
    rows = {key: np.array(row, dtype=np.float64) for key, row in record.items() if _are_numbers(row)}
    return record["step"], rows


def _read_loads_fast(line: bytes) -> tuple[int, dict[str, NDArray[np.float64]]] | None:
    """Decodes a line as a run writes it; None for any other."""
    head, *parts = line.split(b"[")
    begin = _HEAD.fullmatch(head)
    if begin is None or int(begin[1]) >= _LARGEST or not line.endswith(b"]" + _END):
        return None
    names, rows = [begin[2]], []
    for part in parts:
        row, _, rest = part.partition(b"]")
        rows.append(row)
        if (following := _BETWEEN.fullmatch(rest)) is not None:
            names.append(following[1])
        elif rest != _END:
            return None
    counts = [row.count(b",") + 1 for row in rows]
    values = _counts_of(b",".join(rows))
    if values is None or len(values) != sum(counts) or len(names) != len(rows):
        return None
    found, end = {}, 0
    for name, count in zip(names, counts, strict=True):
        found[name.decode(errors="replace")] = values[end : end + count]
        end += count
    return int(begin[1]), found


def _counts_of(numbers: bytes) -> NDArray[np.float64] | None:
    """Returns comma-separated counts, or None if the text holds anything else."""
    # numpy only warns if it cannot read a number. Turning that into an error would change the process-wide filters of
    # warnings, and this module runs in a thread next to training.
    if _COUNTS.fullmatch(numbers) is None:
        return None
    found = np.fromstring(numbers.decode("ascii"), dtype=np.int64, sep=",")
    is_count = len(found) > 0 and found.min() >= 0 and found.max() < _LARGEST
    return found.astype(np.float64) if is_count else None


def _flatten(values: Mapping[str, Any], prefix: str, found: dict[str, float]) -> None:
    """Adds the numbers of nested objects by dotted key."""
    for key, value in values.items():
        kind = type(value)
        if kind is float or (kind is int and -_LARGEST <= value <= _LARGEST):
            found[prefix + key] = value
        elif kind is dict and key != _TABLE_KEY:
            _flatten(value, f"{prefix}{key}.", found)


def _are_numbers(row: object) -> bool:
    return isinstance(row, list) and all(type(value) in (int, float) and abs(value) < _LARGEST for value in row)
