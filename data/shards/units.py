"""Divides files into units of work, which processes and machines claim. Imports no torch."""

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from base.decode import flatten
from base.files import replace_file
from data.corpus import DataError, hash_unit
from data.mix.manifest import MixSource
from data.readers.rows import FilePiece, pieces
from data.readers.sources import size_bytes
from data.registry import CorpusFile
from data.shards.format import FOLDER_KEY, read_json

SETTINGS_NAME = "settings.json"
LOCK_NAME = ".lock"
LEAST_UNIT_BYTES = 2**22
MOST_UNIT_BYTES = 2**28
_UNITS = 16

Cut = Callable[[CorpusFile, int], list[FilePiece]]


@dataclass(frozen=True, kw_only=True, slots=True)
class TextUnit:
    """Pieces of a source that one worker reads, and that appear in a folder together."""

    source: MixSource
    name: str  # hash of the settings and the pieces, equal on every machine
    pieces: tuple[FilePiece, ...]
    files: tuple[tuple[str, int, int], ...]  # key, size and modification time of each file

    @property
    def size_bytes(self) -> int:
        """Bytes on disk of all pieces."""
        return sum(piece.size_bytes for piece in self.pieces)


def choose_unit_bytes(total_bytes: int) -> int:
    """Returns a power of two, so that small corpora have 16 units too and growth rarely changes it."""
    share = max(total_bytes // _UNITS, 1)
    return min(max(1 << (share.bit_length() - 1), LEAST_UNIT_BYTES), MOST_UNIT_BYTES)


def divide(
    source: MixSource, files: Sequence[CorpusFile], unit_bytes: int, settings: object, cut: Cut = pieces
) -> list[TextUnit]:
    """Returns the units of a source, each of about `unit_bytes`: a piece of a large file, or small files."""
    units = []
    names = set[str]()
    for group in _groups(files, unit_bytes, cut):
        described = [(piece.file.key, piece.first, piece.last, piece.size_bytes) for piece in group]
        repeat = 0
        while (name := _hash([settings, described, repeat])) in names:  # folders with equal names in them
            repeat += 1
        names.add(name)
        status = {piece.file.key: piece.file.path.stat() for piece in group}
        current = tuple((key, stat.st_size, stat.st_mtime_ns) for key, stat in status.items())
        units.append(TextUnit(source=source, name=name, pieces=group, files=current))
    return units


def _groups(files: Sequence[CorpusFile], unit_bytes: int, cut: Cut) -> Iterator[tuple[FilePiece, ...]]:
    """Yields the pieces of each unit; a file that changes moves only the ends of units next to it.

    A unit of small files ends before a file that its name's hash selects, once half of the size is reached.
    """
    half = unit_bytes // 2
    group: list[FilePiece] = []
    size = 0
    for file in files:
        file_bytes = size_bytes(file)
        is_end = hash_unit("unit", 0, file.key) * half < file_bytes or size + file_bytes > 3 * half
        if group and (file_bytes >= half or (size >= half and is_end)):
            yield tuple(group)
            group = []
            size = 0
        if file_bytes >= half:
            yield from ((piece,) for piece in cut(file, unit_bytes))
        else:
            group += cut(file, unit_bytes)
            size += file_bytes
    if group:
        yield tuple(group)


def _hash(values: object) -> str:
    return hashlib.sha256(json.dumps(values).encode("utf-8", errors="surrogateescape")).hexdigest()[:16]


class Claims:
    """Locks by name between processes and machines, released when a process ends.

    A process has one object for a folder. Each name is one byte of a lock file. Without locks, as on some file systems,
    each claim succeeds: work is repeated, with equal results.
    """

    def __init__(self, folder: Path) -> None:
        self._descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)

    def close(self) -> None:
        """Releases all claims."""
        os.close(self._descriptor)

    def try_claim(self, name: str) -> bool:
        """Claims a name unless another process has it."""
        return self._lock(name, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def release(self, name: str) -> None:
        """Releases a claim."""
        self._lock(name, fcntl.LOCK_UN)

    @contextmanager
    def claimed(self, name: str) -> Iterator[None]:
        """Waits for a name and holds it."""
        self._lock(name, fcntl.LOCK_EX)
        try:
            yield
        finally:
            self.release(name)

    def _lock(self, name: str, operation: int) -> bool:
        try:
            fcntl.lockf(self._descriptor, operation, 1, int(_hash(name), 16) // 4)
        except OSError as error:
            return error.errno not in (errno.EACCES, errno.EAGAIN)
        return True


def agree_on_settings(
    folder: Path, settings: Mapping[str, Any], claims: Claims, free: Sequence[str] = ()
) -> dict[str, Any]:
    """Returns a folder's settings, which the first command wrote; rejects others, except in `free` keys."""
    path = folder / SETTINGS_NAME
    with claims.claimed(SETTINGS_NAME):
        if not path.exists():
            replace_file(path, json.dumps(settings, indent=1).encode())
        try:
            stored = read_json(path)
        except DataError:  # it says what the file must be
            raise
        except ValueError as error:
            raise DataError(f"{FOLDER_KEY}: {path} must be JSON, is not: {error}; nearest: another folder") from error
    before = dict(flatten(stored))
    now = dict(flatten(json.loads(json.dumps(settings))))
    for key in [*before, *now]:
        if before.get(key) != now.get(key) and key not in free:
            raise DataError(
                f"{FOLDER_KEY}: must be a folder with the same settings, {str(folder)!r} was prepared with {key}="
                f"{json.dumps(before.get(key))}, which is {json.dumps(now.get(key))} now; nearest: another folder"
            )
    unit_bytes = stored["unit_bytes"]
    if type(unit_bytes) is not int or not settings["unit_bytes"] // _UNITS**3 <= unit_bytes <= 2**48:
        near = settings["unit_bytes"]
        rule = "must have unit_bytes of launch.prepare"
        raise DataError(f"{FOLDER_KEY}: {path} {rule}, is {unit_bytes!r}; nearest: {near}")
    return stored
