"""Reads and renews the file `lock.json`, which says who owns a run's folder. No torch here."""

import multiprocessing
import os
import stat
import time
from dataclasses import dataclass
from pathlib import Path

from train.ownership.owner import Owner

LOCK_NAME = "lock.json"
_MOST_BYTES = 65536


class LockedError(ValueError):
    """The folder has another owner, or a lock that cannot be read. The message starts with `out_dir`."""


@dataclass(frozen=True, slots=True)
class LockRecord:
    """The content of a lock: its owner, or None if the file describes none, and when it was last renewed."""

    owner: Owner | None
    renewed: float

    @property
    def name(self) -> str:
        """A description of the owner, for messages."""
        return "an unknown owner" if self.owner is None else str(self.owner)

    @property
    def is_alive_here(self) -> bool:
        """Whether the owner is known to run on this machine."""
        return self.owner is not None and self.owner.is_here and not self.owner.is_gone


def read_lock(path: Path) -> LockRecord | None:
    """Reads a lock; returns None if there is none.

    Raises:
        LockedError: the path is not a regular file.
        OSError: it cannot be read.
    """
    try:
        descriptor = _open(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        return _read(descriptor)
    finally:
        os.close(descriptor)


def renew(path: Path, own_id: str) -> bool:
    """Renews a lock. Returns False without a change if it was removed or has another owner."""
    try:
        descriptor = _open(path)
    except FileNotFoundError:
        return False
    try:
        owner = _read(descriptor).owner
        if owner is None or owner.id != own_id:
            return False
        os.utime(descriptor)  # changes the file that was read, even if another file has its name by now
        return True
    finally:
        os.close(descriptor)


def refuse_if_in_use(folder: Path) -> None:
    """Refuses a folder whose owner is alive on this machine. It changes nothing.

    Raises:
        LockedError: it is in use.
    """
    found = read_lock(folder / LOCK_NAME)
    if found is not None and found.is_alive_here:
        raise in_use_error(folder, found)


def in_use_error(folder: Path, found: LockRecord | None) -> LockedError:
    """Returns the error about a folder that is in use."""
    owner = "another command" if found is None else found.name
    return LockedError(
        f"out_dir: {str(folder)!r} is in use by {owner}; nearest valid: another out_dir, or wait for that process to "
        f"end or stop it"
    )


class OwnershipCheck:
    """A check whether a run still owns its folder, for the rank that writes there."""

    def __init__(self, folder: Path, lock_id: str | None, every_seconds: float = 2.0) -> None:
        """Reads nothing yet.

        Args:
            lock_id: id of the lock that the run's command holds; None: it holds no lock, and nothing is checked.
            every_seconds: time for which a result is reused.
        """
        self._folder = folder
        self._lock_id = lock_id
        self._every_seconds = every_seconds
        self._looked_at = -every_seconds
        self._problem = ""

    @classmethod
    def of_process(cls, folder: Path) -> "OwnershipCheck":
        """Returns the check of this rank. It checks nothing if the folder has no lock.

        The lock belongs to this process or to the launcher that started it.
        """
        try:
            found = read_lock(folder / LOCK_NAME)
        except (LockedError, OSError):
            return cls(folder, None)
        if found is None:
            return cls(folder, None)
        launcher = multiprocessing.parent_process()
        own = (os.getpid(), None if launcher is None else launcher.pid)
        is_own = found.owner is not None and found.owner.is_here and found.owner.pid in own
        return cls(folder, found.owner.id if is_own and found.owner is not None else "")

    def problem(self, *, is_urgent: bool = False) -> str:
        """Returns why the run no longer owns the folder; empty if it does or the lock cannot be read now.

        Args:
            is_urgent: whether to read the lock now, instead of reusing a recent result.
        """
        now = time.monotonic()
        if self._lock_id is not None and (is_urgent or now - self._looked_at >= self._every_seconds):
            self._looked_at = now
            self._problem = self._look(self._lock_id)
        return self._problem

    def _look(self, lock_id: str) -> str:
        try:
            found = read_lock(self._folder / LOCK_NAME)
        except LockedError:
            return f"its lock in {self._folder} was replaced"
        except OSError:
            return ""
        if found is None:
            removed = f"{LOCK_NAME} in it was removed" if self._folder.is_dir() else "it was deleted or moved"
            return f"the run's folder {self._folder} is no longer its own: {removed}"
        if found.owner is None or found.owner.id != lock_id:
            return f"the run's folder {self._folder} was taken over by {found.name}"
        return ""


def _open(path: Path) -> int:
    """Opens a lock for reading. It follows no symbolic link, and does not block on a pipe."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        if path.is_symlink() or path.is_socket():
            raise _not_a_file_error(path) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _not_a_file_error(path)
    return descriptor


def _read(descriptor: int) -> LockRecord:
    text = os.read(descriptor, _MOST_BYTES).decode("utf-8", errors="replace")
    return LockRecord(Owner.from_text(text), os.fstat(descriptor).st_mtime)


def _not_a_file_error(path: Path) -> LockedError:
    return LockedError(
        f"out_dir: {path.name} must be a file, {str(path)!r} is something else; nearest valid: another out_dir"
    )
