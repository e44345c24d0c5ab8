"""Writes files that appear whole or not at all."""

import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_ABANDONED_SECONDS = 3600


def remove_abandoned(paths: Iterable[Path]) -> None:
    """Removes files and folders of processes that were killed. Another process may be writing to new ones."""
    for path in paths:
        with suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime <= _ABANDONED_SECONDS:
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields where to write a file, which has its name when it is complete, or never."""
    partial = path.with_name(f".{path.name}-{uuid.uuid4().hex}.partial")
    try:
        yield partial
        partial.rename(path)
    finally:
        with suppress(OSError):
            partial.unlink()


def replace_text(path: Path, text: str) -> None:
    """Writes a file in place of an earlier one, which stays until the new one is complete."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def replace_file(path: Path, content: bytes | Iterable[bytes]) -> None:
    """Writes a file that is complete or absent, even after a crash."""
    with replacing(path) as partial:
        write_synced(partial, content)
    sync(path.parent)


def write_synced(path: Path, content: bytes | Iterable[bytes]) -> None:
    """Writes a new file, and waits until its content is on disk."""
    with path.open("xb") as file:
        file.writelines((content,) if isinstance(content, bytes) else content)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of files, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
