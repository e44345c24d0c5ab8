"""Cache of folders that are built once: complete or absent, even after crashes or concurrent builds."""

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

# An installation can fail only while other processes replace the same broken entry.
INSTALL_ATTEMPTS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheEntry:
    """A complete folder and the values that its builder stored in `meta.json`."""

    folder: Path
    values: Mapping[str, Any]


def open_or_build(cache_dir: Path, name: str, build: Callable[[Path], Mapping[str, int | float | str]]) -> CacheEntry:
    """Returns the cache entry with a name, which must identify everything that its content depends on.

    `build` fills an empty folder and returns the values to store. It runs if the entry is missing, or if `meta.json` or
    a file size is wrong. The folder is written to disk completely and then renamed. Concurrent processes may each build
    the same entry; the first rename wins, and the others use its result. Raises DataError if `cache_dir` cannot be
    written.
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
    """Renames a finished folder to its final name. Replaces a broken entry, keeps a complete one."""
    with _exclusive(folder.parent):
        if _open(folder) is not None:
            return
        # Try the rename first, so that an entry that another process has just installed is never moved away.
        if not _renamed(building, folder) and _open(folder) is None:
            _remove(folder)
            _renamed(building, folder)
        _flush(folder.parent)


@contextlib.contextmanager
def _exclusive(cache_dir: Path) -> Iterator[None]:
    """Lets one process at a time replace entries: another could move away an entry that is now complete."""
    descriptor = os.open(cache_dir, os.O_RDONLY)
    try:
        # Without file locks, only the atomicity of the rename remains. A lock is released when its process ends.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _renamed(building: Path, folder: Path) -> bool:
    try:
        building.rename(folder)
    except OSError as error:
        # The name is taken; or, without file locks, another process moved this folder away.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.ENOENT):
            raise
        return False
    return True


def _remove(folder: Path) -> None:
    # Renamed before it is deleted, so that no process sees a partly deleted entry.
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
