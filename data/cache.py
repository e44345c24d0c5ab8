"""Folders that are built once and kept: complete or absent, whatever is killed and whoever races."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.corpus import DataError

META_NAME = "meta.json"

# Installing fails only while other processes replace the same broken entry.
INSTALL_ATTEMPTS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheEntry:
    """A complete folder and the values that its builder noted down."""

    folder: Path
    values: Mapping[str, Any]


def open_or_build(cache_dir: Path, name: str, build: Callable[[Path], Mapping[str, int | float | str]]) -> CacheEntry:
    """The entry of this name; built when absent, rebuilt when `meta.json` or a file's size is not as written.

    The folder appears by one rename after everything in it has reached the disk. Processes that race build
    the same thing each; the first rename wins, and the others take its result.

    Args:
        cache_dir: made when missing.
        name: of the folder; says everything that its content depends on.
        build: fills an empty folder with files and returns the values to note down.

    Raises:
        DataError: `cache_dir` cannot be written.
    """
    folder = cache_dir / name
    entry = _open(folder)
    if entry is not None:
        return entry
    building = cache_dir / f".building-{name}-{uuid.uuid4().hex}"
    try:
        building.mkdir(parents=True)
        _write_meta(building, build(building))
        for _ in range(INSTALL_ATTEMPTS):
            _install(building, folder)
            entry = _open(folder)
            if entry is not None:
                return entry
    except OSError as error:
        raise DataError(
            f"data.cache_dir: {str(cache_dir)!r} must be a folder that can be written: {error}"
            f"{_nearest_folder(cache_dir)}"
        ) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    raise DataError(f"data.cache_dir: {folder} was built but cannot be read back; something else writes there")


def _open(folder: Path) -> CacheEntry | None:
    """The entry, if it is whole."""
    try:
        meta = json.loads((folder / META_NAME).read_text(encoding="utf-8"))
        whole = all((folder / name).stat().st_size == size for name, size in meta["file_bytes"].items())
        return CacheEntry(folder=folder, values=meta["values"]) if whole else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _write_meta(folder: Path, values: Mapping[str, int | float | str]) -> None:
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    meta = {"file_bytes": sizes, "values": dict(values)}
    (folder / META_NAME).write_text(json.dumps(meta, indent=1), encoding="utf-8")
    for path in (*folder.iterdir(), folder):
        _flush(path)


def _install(building: Path, folder: Path) -> None:
    """Puts a finished folder in its place; leaves a whole one that is there already, moves a broken one away."""
    with _exclusive(folder.parent):
        if _open(folder) is not None:
            return
        # Into an empty place first: what another process put there since is then never moved away.
        if not _renamed(building, folder) and _open(folder) is None:
            _remove(folder)
            _renamed(building, folder)
        _flush(folder.parent)


@contextlib.contextmanager
def _exclusive(cache_dir: Path) -> Iterator[None]:
    """One process at a time replaces entries: what it found broken may otherwise be whole when it is moved away."""
    descriptor = os.open(cache_dir, os.O_RDONLY)
    try:
        # A file system without locks leaves what a rename alone can promise; a lock ends with its process.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _renamed(building: Path, folder: Path) -> bool:
    """Whether the folder took the name; not when the name is taken by another."""
    try:
        building.rename(folder)
    except OSError as error:
        # Taken; or gone already, where without locks another process moved away what we put there.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.ENOENT):
            raise
        return False
    return True


def _remove(folder: Path) -> None:
    # Moved whole before it is deleted: nobody sees it half deleted.
    broken = folder.with_name(f".broken-{uuid.uuid4().hex}")
    with contextlib.suppress(FileNotFoundError):
        folder.rename(broken)
        if broken.is_dir():
            shutil.rmtree(broken)
        else:
            broken.unlink()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _nearest_folder(path: Path) -> str:
    for parent in path.absolute().parents:
        if parent.is_dir() and os.access(parent, os.W_OK):
            return f"; nearest: {str(parent)!r}"
    return ""
