"""Keeps an evaluation in a folder, so that an interrupted one continues. Imports no torch.

`evaluation.json` says what decides the records. `samples_TASK.jsonl` has a record a line, and `results.json` is written
last. A line that is not whole at the end of a file is the only damage that an interruption can do.
"""

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from data.corpus import decode_json
from infer.evaluate.protocol import EvaluationError, Record

IDENTITY_NAME = "evaluation.json"
RESULTS_NAME = "results.json"


class EvaluationFolder(AbstractContextManager["EvaluationFolder"]):
    """The folder of an evaluation, locked. Use it as a context manager."""

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Opens or creates the folder. It must be free, and its records those of the same `identity`."""
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._compare(json.loads(json.dumps(identity)))
        except BaseException as error:
            os.close(self._lock)
            if isinstance(error, BlockingIOError):
                raise EvaluationError(
                    f"out: another process evaluates into {str(path)!r}; wait for it, or choose another folder"
                ) from None
            raise

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)

    @property
    def is_complete(self) -> bool:
        """Whether the results are written."""
        return (self.path / RESULTS_NAME).is_file()

    def read(self, task: str) -> list[Record]:
        """Returns the records of a task as `read_records`, and removes a line that an interruption cut."""
        records = read_records(self.path, task)
        path = self.path / samples_name(task)
        content = path.read_bytes() if path.exists() else b"\n"
        if not content.endswith(b"\n"):
            os.truncate(path, content.rfind(b"\n") + 1)
        return records

    def append(self, task: str, records: Sequence[Record]) -> None:
        """Adds records; they are on the disk when this returns."""
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        with (self.path / samples_name(task)).open("ab", buffering=0) as file:
            file.write(lines.encode("utf-8", "replace"))
            os.fsync(file.fileno())

    def write(self, name: str, text: str) -> None:
        """Replaces a file."""
        partial = self.path / f"{name}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(self.path / name)

    def _compare(self, identity: dict[str, Any]) -> None:
        path = self.path / IDENTITY_NAME
        if not path.exists():
            others = sorted(file.name for file in self.path.glob("samples_*.jsonl"))
            if others:
                raise EvaluationError(
                    f"out: {str(self.path)!r} must have {IDENTITY_NAME}, has {others[0]} without it; "
                    "nearest valid: another folder"
                )
            self.write(IDENTITY_NAME, json.dumps(identity, indent=2, ensure_ascii=False) + "\n")
            return
        try:
            written = json.loads(path.read_text(encoding="utf-8"))
            different = [key for key in {**written, **identity} if written.get(key) != identity.get(key)]
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise EvaluationError(
                f"out: {str(path)!r} must be one of launch.evaluate, cannot be read: {error}"
            ) from error
        if different:
            key = different[0]
            rule = f"must be as in {str(path)!r}, which has {written.get(key)!r}"
            raise EvaluationError.broken(key, rule, repr(identity.get(key)), "another out, or remove this folder")


def samples_name(task: str) -> str:
    """Returns the name of the file of a task's records."""
    return f"samples_{task}.jsonl"


def read_records(folder: Path, task: str) -> list[Record]:
    """Returns the records of a task in a folder, without a line that an interruption cut."""
    path = folder / samples_name(task)
    if not path.exists():
        return []
    with path.open("rb") as file:
        return [
            _record(line, f"out: {path}, line {number}") for number, line in enumerate(file, 1) if line.endswith(b"\n")
        ]


def _record(line: bytes, place: str) -> Record:
    try:
        values = decode_json(line)
    except (ValueError, RecursionError) as error:
        raise EvaluationError(f"{place}: must be a record of launch.evaluate, cannot be read: {error}") from error
    if not isinstance(values, dict) or not isinstance(values.get("id"), str | int):
        raise EvaluationError(f"{place}: must be a record of launch.evaluate, has no id")
    return values
