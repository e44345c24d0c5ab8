"""Files of JSON lines to which one process appends. A killed process may leave a cut last line."""

import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any


def lock(descriptor: int) -> bool:
    """Locks an open file or folder until it is closed. Returns false if another process has locked it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def append(file: FileIO, content: bytes) -> None:
    """Appends whole lines or, on a full disk, nothing."""
    before = os.fstat(file.fileno()).st_size
    rest = memoryview(content)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError:
        with suppress(OSError):
            os.ftruncate(file.fileno(), before)
        raise


def append_synced(file: FileIO, records: Iterable[Mapping[str, Any]]) -> None:
    """Appends a line for each record; they are on the disk when this returns."""
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    append(file, lines.encode("utf-8", "replace"))
    os.fsync(file.fileno())


def read_whole_lines(path: Path) -> list[bytes]:
    """Returns the lines of a file without a last one that an interruption cut; none if there is no file."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        return [line for line in file if line.endswith(b"\n")]


def remove_cut_line(path: Path) -> None:
    """Removes a last line that an interruption cut. Check before that the file is a journal."""
    num_bytes = sum(map(len, read_whole_lines(path)))
    if path.exists() and num_bytes < path.stat().st_size:
        os.truncate(path, num_bytes)


def changed_key(written: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """Returns the first key with another value in a journal's identity, or None."""
    return next((key for key in {**written, **wanted} if written.get(key) != wanted.get(key)), None)
