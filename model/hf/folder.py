"""A folder that is there complete or not at all. No torch here."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from model.hf.errors import HfError


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that becomes `path` when the body ends well, and vanishes otherwise, with all that was made for it.

    Args:
        path: absent or an empty folder; folders above it are made.

    Raises:
        HfError: something is at `path`, or the disk refuses.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise HfError(path, "", f"must be absent or an empty folder, is {'not empty' if path.is_dir() else 'a file'}")
    missing = [folder for folder in path.absolute().parents if not folder.exists()]
    partial = path.absolute().parent / f".{path.name}.{secrets.token_hex(4)}.partial"
    try:
        partial.mkdir(parents=True)
        yield partial
        _sync_folder(partial)
        partial.rename(path)
        _sync_folder(path.absolute().parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):
            for folder in missing:
                folder.rmdir()
        if isinstance(error, OSError):
            raise HfError(path, "", f"must be writable, is not ({error.strerror or error})") from error
        raise


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
