"""Locks a run's folder: one owner at a time, on local and on shared file systems. No torch here.

The lock is the file `lock.json`, which describes its owner. It is created atomically by a hard link, which also works
on NFS. Its owner renews its modification time. Times are compared with that of a file which was just modified, so only
the clock of the file system counts.
"""

import errno
import json
import multiprocessing
import os
import re
import secrets
import shlex
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from train.files.run_files import redact

LOCK_NAME = "lock.json"
RENEW_SECONDS = 5.0
LEASE_SECONDS = 60.0
"""Age after which a lock of another machine is stale if it was not renewed."""
CHECK_SECONDS = 2.0
"""Time for which a result of the ownership check is reused."""

_LOOK_SECONDS = 0.5
_MOST_TAKEOVERS = 2
_MOST_BYTES = 65536
_LONGEST_TEXT = 300
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("id", "host", "machine", "started", "command"), str),
    "pid": int,
    "time": (int, float),
}


class LockedError(ValueError):
    """The folder has another owner, or a lock that cannot be read. The message starts with `out_dir`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Owner:
    """A process that owns a file or a folder. `id` is random; `pid` counts within `machine`.

    `machine` is one boot and one PID namespace. `started` is in the format of the system, empty if unknown.
    The command line is without secrets.
    """

    id: str
    host: str
    machine: str
    pid: int
    started: str
    time: float
    command: str

    @classmethod
    def of_this_process(cls) -> Self:
        """Returns a new owner that describes this process."""
        return cls(
            id=secrets.token_hex(16),
            host=socket.gethostname(),
            machine=_machine(),
            pid=os.getpid(),
            started=_start_time(os.getpid()) or "",
            time=time.time(),
            command=redact(shlex.join(sys.orig_argv[1:]))[:_LONGEST_TEXT],
        )

    @classmethod
    def from_text(cls, text: str) -> Self | None:
        """Returns the owner that a file describes, or None if it describes none."""
        try:
            values = json.loads(text)
            return cls(**values) if _is_valid(values) else None
        except (ValueError, TypeError, RecursionError):
            return None

    def to_text(self) -> str:
        """Returns the text that `from_text` reads."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @property
    def is_here(self) -> bool:
        """Whether the owner runs on this machine and in this PID namespace."""
        return self.machine == _machine()

    @property
    def is_gone(self) -> bool:
        """Whether the owner has ended; False if it runs on another machine."""
        return self.is_here and _start_time(self.pid) != self.started

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.time))
        text = f"host {self.host}, pid {self.pid} since {since} (command: {self.command})"
        return "".join(letter if letter.isprintable() else "?" for letter in text)


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


class RunLock:
    """A lock that this process owns. A thread renews it until `release`, or the end of its `with` block."""

    def __init__(self, folder: Path, say: Callable[[str], None], lease_seconds: float = LEASE_SECONDS) -> None:
        """Acquires the lock of a folder, at once if it is free, or else when the present lock is stale.

        A lock of another machine is stale after `lease_seconds`.

        Raises:
            LockedError: the folder has another owner.
            OSError: no lock can be written there.
        """
        self.taken_from = ""
        self._path = folder / LOCK_NAME
        self._owner = Owner.of_this_process()
        self._say = say
        self._lease_seconds = lease_seconds
        self._own_path = folder / f"{LOCK_NAME}.{self._owner.id}.partial"
        try:
            _write_new(self._own_path, self._owner.to_text())
            self._take(self._path)
        finally:
            self._own_path.unlink(missing_ok=True)
        if self.taken_from:
            say(f"out_dir: the lock of {self.taken_from} is stale and is taken over")
        self._is_over = threading.Event()
        threading.Thread(target=self._renew_on, name="run lock", daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

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

    def _take(self, path: Path, depth: int = 0) -> None:
        """Creates this process's lock at a path that is free or has a stale lock."""
        if self._put(path):
            return
        stale = self._wait_until_stale(path)
        if stale is not None:
            self._replace(path, stale, depth)
        elif not self._put(path):  # it was released, but another process created the next lock first
            raise _in_use_error(self._path.parent, read_lock(path))

    def _replace(self, path: Path, stale: LockRecord, depth: int) -> None:
        """Replaces a stale lock. A second lock, on the stale lock, ensures that only one process replaces it."""
        if depth == _MOST_TAKEOVERS:
            raise _in_use_error(self._path.parent, stale)
        guard = path.with_name(f"{path.name}.{'unknown' if stale.owner is None else stale.owner.id}.takeover")
        self._take(guard, depth + 1)
        try:
            now = read_lock(path)
            if now != stale:
                raise _in_use_error(self._path.parent, now)
            copy = path.with_name(f"{self._own_path.name}-{depth}")
            _write_new(copy, self._owner.to_text())
            os.replace(copy, path)
            self.taken_from = stale.name
        finally:
            guard.unlink(missing_ok=True)

    def _put(self, path: Path) -> bool:
        """Creates this process's lock, and returns whether the path was free."""
        try:
            os.link(self._own_path, path)
        except FileExistsError:
            # NFS may create the link and lose the response.
            return os.path.lexists(path) and os.path.samestat(os.lstat(self._own_path), os.lstat(path))
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
        """
        first = lock = read_lock(path)
        until = time.monotonic() + self._lease_seconds
        has_said = False
        while lock is not None:
            if lock.owner is not None and lock.owner.is_gone:
                return lock
            if lock.is_alive_here or lock != first:
                raise _in_use_error(self._path.parent, lock)
            # A modification time in the future has no age, so its lock is stale if no one renews it during the wait.
            os.utime(self._own_path)
            now = self._own_path.stat().st_mtime
            if now - lock.renewed >= self._lease_seconds or time.monotonic() >= until:
                return lock
            if not has_said:
                self._say(f"out_dir: waits up to {self._lease_seconds:g} s to see if {lock.name} renews its lock")
            has_said = True
            time.sleep(min(_LOOK_SECONDS, self._lease_seconds / 10))
            lock = read_lock(path)
        return None


class OwnershipCheck:
    """A check whether a run still owns its folder, for the rank that writes there.

    The lock belongs to this process or to the launcher that started it. Nothing is checked if the folder has no lock.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._looked_at = -CHECK_SECONDS
        self._problem = ""
        self._lock_id: str | None = None
        with suppress(LockedError, OSError):
            if (record := read_lock(folder / LOCK_NAME)) is not None:
                launcher = multiprocessing.parent_process()
                pids = (os.getpid(), None if launcher is None else launcher.pid)
                owner = record.owner
                self._lock_id = owner.id if owner is not None and owner.is_here and owner.pid in pids else ""

    def problem(self, *, is_urgent: bool = False) -> str:
        """Returns why the run no longer owns the folder; empty if it does or the lock cannot be read now."""
        now = time.monotonic()
        if self._lock_id is not None and (is_urgent or now - self._looked_at >= CHECK_SECONDS):
            self._looked_at = now
            self._problem = self._look()
        return self._problem

    def _look(self) -> str:
        try:
            record = read_lock(self._folder / LOCK_NAME)
        except LockedError:
            return f"its lock in {self._folder} was replaced"
        except OSError:
            return ""
        if record is None:
            removed = f"{LOCK_NAME} in it was removed" if self._folder.is_dir() else "it was deleted or moved"
            return f"the run's folder {self._folder} is no longer its own: {removed}"
        if record.owner is None or record.owner.id != self._lock_id:
            return f"the run's folder {self._folder} was taken over by {record.name}"
        return ""


def read_lock(path: Path) -> LockRecord | None:
    """Reads a lock, or returns None; raises LockedError if the path is not a regular file."""
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
    """Raises LockedError if the owner of a folder is alive on this machine. Changes nothing."""
    record = read_lock(folder / LOCK_NAME)
    if record is not None and record.is_alive_here:
        raise _in_use_error(folder, record)


def _in_use_error(folder: Path, record: LockRecord | None) -> LockedError:
    owner = "another command" if record is None else record.name
    return LockedError(
        f"out_dir: {str(folder)!r} is in use by {owner}; nearest valid: another out_dir, or wait for that process to "
        f"end or stop it"
    )


def _open(path: Path) -> int:
    """Opens a lock for reading. It follows no symbolic link, and does not block on a pipe."""
    problem = LockedError(
        f"out_dir: {path.name} must be a file, {str(path)!r} is something else; nearest valid: another out_dir"
    )
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if path.is_symlink() or path.is_socket():
            raise problem from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise problem
    return descriptor


def _read(descriptor: int) -> LockRecord:
    text = os.read(descriptor, _MOST_BYTES).decode("utf-8", errors="replace")
    return LockRecord(Owner.from_text(text), os.fstat(descriptor).st_mtime)


def _write_new(path: Path, text: str) -> None:
    """Creates and writes a file; fails if it exists."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)


def _is_valid(values: Any) -> bool:
    if not isinstance(values, dict) or values.keys() != _TYPES.keys():
        return False
    if not all(isinstance(values[key], kind) and not isinstance(values[key], bool) for key, kind in _TYPES.items()):
        return False
    is_short = all(len(values[key]) <= _LONGEST_TEXT for key in ("host", "machine", "started", "command"))
    is_in_range = values["pid"] > 0 and 0 <= values["time"] < 2**33
    return is_short and is_in_range and re.fullmatch(r"[0-9a-f]{32}", values["id"]) is not None


def _machine() -> str:
    """Returns an identifier that differs between two boots, two machines and two containers."""
    try:
        boot = _BOOT_ID.read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return f"{socket.gethostname()} {sys.platform}"


def _start_time(pid: int) -> str | None:
    """Returns when a process started, or None if it has ended. A zombie counts as ended."""
    if _BOOT_ID.exists():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in "ZX" else fields[19]
    listing = subprocess.run(["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    state, _, started = listing.stdout.strip().partition(" ")
    return None if not state or state[0] in "ZX" else started.strip()
