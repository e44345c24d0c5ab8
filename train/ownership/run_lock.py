"""Locks a run's folder: one owner at a time, on local and on shared file systems. No torch here.

The lock is the file `lock.json`. It is created atomically by a hard link, which also works on NFS. Its owner renews its
modification time. Times are compared with that of a file which was just modified, so only the clock of the file system
counts.
"""

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from train.ownership.lock_file import LOCK_NAME, LockRecord, in_use_error, read_lock, renew
from train.ownership.owner import Owner

RENEW_SECONDS = 5.0
LEASE_SECONDS = 60.0
"""Age after which a lock of another machine is stale if it was not renewed."""
_LOOK_SECONDS = 0.5
_MOST_TAKEOVERS = 2
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class RunLock:
    """A lock that this process owns. A thread renews it until `release`.

    Attributes:
        taken_from: description of the owner whose stale lock it replaced; empty if there was none.
    """

    taken_from: str

    def __init__(self, path: Path, owner: Owner, taken_from: str) -> None:
        """Starts to renew a lock that was just created.

        Args:
            owner: this process, as the lock describes it.
            taken_from: description of the owner whose stale lock it replaced, or an empty text.
        """
        self.taken_from = taken_from
        self._path = path
        self._owner = owner
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._renew_on, name="run lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Removes the lock if this process still owns it."""
        self._is_over.set()
        # It is renewed first, so that no other process considers it stale while it is removed.
        with suppress(OSError, ValueError):
            if renew(self._path, self._owner.id):
                self._path.unlink()

    def _renew_on(self) -> None:
        while not self._is_over.wait(RENEW_SECONDS):
            # A file server that does not respond may respond the next time.
            with suppress(OSError):
                if not renew(self._path, self._owner.id):
                    return


@contextmanager
def locked(folder: Path, say: Callable[[str], None], lease_seconds: float = LEASE_SECONDS) -> Iterator[RunLock]:
    """Holds the lock of a folder inside the `with` block.

    Args:
        say: prints a line for people if a stale lock is taken over, or if this waits for one to become stale.
        lease_seconds: age after which a lock of another machine is stale.

    Raises:
        LockedError: the folder has another owner.
        OSError: no lock can be written there.
    """
    lock = acquire(folder, say, lease_seconds)
    try:
        yield lock
    finally:
        lock.release()


def acquire(folder: Path, say: Callable[[str], None], lease_seconds: float = LEASE_SECONDS) -> RunLock:
    """Acquires the lock like `locked`, for a caller that calls `release` itself."""
    owner, path = Owner.of_this_process(), folder / LOCK_NAME
    own = path.with_name(f"{LOCK_NAME}.{owner.id}.partial")
    try:
        _write_new(own, owner.to_text())
        attempt = _Attempt(own, owner, say, lease_seconds)
        attempt.take(path)
    finally:
        own.unlink(missing_ok=True)
    if attempt.taken_from:
        say(f"out_dir: the lock of {attempt.taken_from} is stale and is taken over")
    return RunLock(path, owner, attempt.taken_from)


class _Attempt:
    """One process's attempt to acquire a lock."""

    def __init__(self, own: Path, owner: Owner, say: Callable[[str], None], lease_seconds: float) -> None:
        self._own = own
        self._owner = owner
        self._say = say
        self._lease_seconds = lease_seconds
        self.taken_from = ""

    def take(self, path: Path, depth: int = 0) -> None:
        """Creates this process's lock, at once if the path is free, or else when the present lock is stale."""
        if self._put(path):
            return
        stale = self._wait_until_stale(path)
        if stale is not None:
            self._replace(path, stale, depth)
        elif not self._put(path):  # it was released, but another process created the next lock first
            raise self._in_use_error(read_lock(path))

    def _replace(self, path: Path, stale: LockRecord, depth: int) -> None:
        """Replaces a stale lock. A second lock, on the stale lock, ensures that only one process replaces it."""
        if depth == _MOST_TAKEOVERS:
            raise self._in_use_error(stale)
        name = "unknown" if stale.owner is None else stale.owner.id
        guard = path.with_name(f"{path.name}.{name}.takeover")
        self.take(guard, depth + 1)
        try:
            now = read_lock(path)
            if now != stale:
                raise self._in_use_error(now)
            copy = path.with_name(f"{self._own.name}-{depth}")
            _write_new(copy, self._owner.to_text())
            os.replace(copy, path)
            self.taken_from = stale.name
        finally:
            guard.unlink(missing_ok=True)

    def _put(self, path: Path) -> bool:
        """Creates this process's lock, and returns whether the path was free."""
        try:
            os.link(self._own, path)
        except FileExistsError:
            # NFS may create the link and lose the response.
            return os.path.samestat(os.lstat(self._own), os.lstat(path)) if os.path.lexists(path) else False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            with suppress(FileExistsError):
                _write_new(path, self._owner.to_text())
                return True
            return False
        return True

    def _wait_until_stale(self, path: Path) -> LockRecord | None:
        """Returns the lock once it is stale, or None if it was released.

        It waits only if the owner runs on another machine, because its process cannot be checked there.

        Raises:
            LockedError: the owner is alive, or renews the lock.
        """
        first = found = read_lock(path)
        until, has_said = time.monotonic() + self._lease_seconds, False
        while found is not None:
            if found.owner is not None and found.owner.is_here and found.owner.is_gone:
                return found
            if found.is_alive_here or found != first:
                raise self._in_use_error(found)
            # A modification time in the future has no age, so its lock is stale if no one renews it during the wait.
            if self._now() - found.renewed >= self._lease_seconds or time.monotonic() >= until:
                return found
            if not has_said:
                self._say(f"out_dir: waits up to {self._lease_seconds:g} s to see if {found.name} renews its lock")
            has_said = True
            time.sleep(min(_LOOK_SECONDS, self._lease_seconds / 10))
            found = read_lock(path)
        return None

    def _now(self) -> float:
        """Returns the present time of the file system's clock."""
        os.utime(self._own)
        return self._own.stat().st_mtime

    def _in_use_error(self, found: LockRecord | None) -> Exception:
        return in_use_error(self._own.parent, found)


def _write_new(path: Path, text: str) -> None:
    """Creates and writes a file; fails if it exists."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
