"""Creates folders atomically and checks that files can be read to their end. Imports no torch."""

import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from model.hf.errors import HfError


@contextmanager
def create_folder_atomically(path: Path) -> Iterator[Path]:
    """Yields a folder that becomes `path`, absent or empty, if the body succeeds, else is removed.

    Raises:
        HfError: something is at `path`, or writing fails.
    """
    target = Path(os.path.realpath(path))
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise HfError(path, "", f"must be absent or an empty folder, is {'not empty' if path.is_dir() else 'a file'}")
    # Checked before the work instead of failing in its last step.
    if target == Path.cwd() or os.path.ismount(target):
        what = "the working folder" if target == Path.cwd() else "a mount point"
        raise HfError(path, "", f"must be a folder that can be replaced, is {what}; nearest: a new folder in it")
    missing = [folder for folder in target.parents if not folder.exists()]
    partial = target.parent / f".{target.name}.{secrets.token_hex(4)}.partial"
    try:
        partial.mkdir(parents=True)
        yield partial
        sync(partial)
        partial.rename(target)
        sync(target.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):
            for folder in missing:
                folder.rmdir()
        if isinstance(error, OSError):
            raise HfError(path, "", f"must be writable, is not ({error.strerror or error})") from error
        raise


def check_kind(path: Path) -> None:
    """Raises an error for pipes and devices, on which reading could block or never end."""
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # opening a folder gives the clearest error
        raise HfError(path, "", "must be a file, is a pipe or a device")


def write_synced(path: Path, content: bytes) -> None:
    """Writes a new file, and waits until its content is on disk."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of files, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
