"""Supervises a command's ranks next to torch's elastic launcher, and reports why they failed.

It forwards preemption requests to local ranks, kills ranks that keep running after another one failed, and detects
vanished ranks, for which the launcher would wait forever.
"""

import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from tempfile import TemporaryDirectory

from comm.exits import EXIT_CONFIGURATION, EXIT_HANG, EXIT_LOST, Preemption
from launch.ranks.interrupt import EXIT_INTERRUPTED
from train.errors import find_errors, find_verdict, read_error
from train.files.run_files import redact
from train.files.run_lock import LockedError, Owner, read_lock

PID_PREFIX = "pid_"
_SCRATCH_PREFIX = "launch-"
_OWNER_NAME = "owner.json"
_LOOK_SECONDS = 0.25
# Time after the first error report until the other ranks are killed; by then they should know the verdict. The elastic
# launcher would wait 30 s for each rank, and a stopped rank uses all of it.
_VERDICT_SECONDS = 1.2
_ERROR_SECONDS = 3.0
# Time after a rank has vanished until the others are killed; by then they should have a verdict.
_VANISHED_SECONDS = 4.0


class RankSupervisor:
    """Thread that supervises ranks next to the launcher. Each rank writes a file `pid_*` into `scratch`."""

    def __init__(self, folder: Path, scratch: Path, request: Preemption, grace_seconds: float) -> None:
        self._folder = folder
        self.scratch = scratch
        self._request = request
        self._grace_seconds = grace_seconds
        self._ranks: dict[Path, int] = {}
        self._signalled: set[Path] = set()
        self._requested_at: float | None = None
        self.vanished_at: float | None = None
        self._is_over = threading.Event()
        self.has_grace_expired = False

    @contextmanager
    def running(self) -> Iterator[None]:
        """Runs the supervisor while the context is active, if the system has pidfd (safe against pid reuse)."""
        if not hasattr(os, "pidfd_open"):
            yield
            return
        thread = threading.Thread(target=self._supervise, name="supervisor", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._is_over.set()
            thread.join()
            for descriptor in self._ranks.values():
                os.close(descriptor)

    def kill_ranks(self) -> None:
        """Kills all ranks, and waits for their end at most a few seconds each."""
        for descriptor in list(self._ranks.values()):
            _send(descriptor, signal.SIGKILL)
            connection.wait([descriptor], _VANISHED_SECONDS)

    def _supervise(self) -> None:
        while not self._is_over.wait(_LOOK_SECONDS):
            for path in self.scratch.glob(f"{PID_PREFIX}*"):
                if path not in self._ranks:
                    # The kernel may reuse a pid for another process, but never an open pidfd.
                    with suppress(ProcessLookupError):
                        self._ranks[path] = os.pidfd_open(pid_of(path))
            if self._request.is_requested:
                self._forward_request()
            if self._is_time_up():
                for descriptor in self._ranks.values():
                    _send(descriptor, signal.SIGKILL)

    def _forward_request(self) -> None:
        if self._requested_at is None:
            self._requested_at = time.monotonic()
        for path in self._ranks.keys() - self._signalled:
            self._signalled.add(path)
            _send(self._ranks[path], signal.Signals[self._request.signal_name])

    def _is_time_up(self) -> bool:
        """Returns whether ranks run too long after another rank's error or after a preemption request."""
        if self._requested_at is not None and time.monotonic() - self._requested_at > self._grace_seconds:
            self.has_grace_expired = True
            return True
        if self.vanished_at is not None and time.monotonic() - self.vanished_at > _VANISHED_SECONDS:
            return True
        try:
            paths = find_errors(self._folder)
            is_known = any(read_error(path).code in (EXIT_HANG, EXIT_LOST) for path in paths)
            grace = _VERDICT_SECONDS if is_known else _ERROR_SECONDS
            return bool(paths) and time.time() - paths[0].stat().st_mtime > grace
        except FileNotFoundError:  # the run's folder was deleted in the meantime
            return False


def _send(descriptor: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(descriptor, number)


class VanishedError(RuntimeError):
    """Ranks ended with exit code 0 without returning a result."""


@dataclass(slots=True)
class RankCheck:
    """Detects ranks that ended with exit code 0 but without a result, which torch's launcher ignores.

    Call it after each poll of the launcher. Between two calls, the launcher finds every rank that ended with another
    exit code, and a rank with a result waits for all others. So a rank that is missing in two calls has vanished.
    """

    world_size: int
    supervisor: RankSupervisor
    num_missing: int = 0

    def __call__(self) -> None:
        """Checks the ranks once."""
        alive = {child.pid for child in multiprocessing.active_children()}
        num_missing = self.world_size - len(alive)
        if num_missing > 0 and self.num_missing > 0:
            self.supervisor.vanished_at = time.monotonic()  # ends the others after a few seconds
            from comm.watchdog.ranks import name_ranks

            files = self.supervisor.scratch.glob(f"{PID_PREFIX}*")
            ranks = name_ranks(sorted(int(path.read_text()) for path in files if pid_of(path) not in alive))
            raise VanishedError(f"{ranks} ended with exit code 0 before the run was done")
        self.num_missing = num_missing


def write_pid_file(scratch: Path, pid: int, rank: int) -> None:
    """Writes the file that registers a rank's process, atomically."""
    partial = scratch / f"partial_{pid}"
    partial.write_text(str(rank))
    partial.rename(scratch / f"{PID_PREFIX}{pid}")


def pid_of(path: Path) -> int:
    """Returns the process id in the name of a file that `write_pid_file` wrote."""
    return int(path.name.removeprefix(PID_PREFIX))


def report_lost(folder: Path, code: int, reason: str, effect: str = "") -> tuple[int, str]:
    """Prints and returns the verdict of the other ranks with its effect, or code and reason without one."""
    if (verdict := find_verdict(folder)) is None:
        print_redacted(f"error: {reason}")
        return code, reason
    path, report = verdict
    print_redacted(f"error: {report.text}{effect}", f"the log of each rank is in {path.parent}")
    return report.code, f"{report.text}{effect}"


def report_failure(folder: Path, rank: int, exit_code: int, request: Preemption) -> tuple[int, str]:
    """Prints one short report of why a rank failed first; exit code -n says that signal n ended it."""
    signalled = _signal_of(exit_code)
    if signalled is signal.SIGINT:
        return EXIT_INTERRUPTED, "ended by SIGINT"
    if signalled is not None and signalled.name == request.signal_name:
        return 128 + signalled, f"ended by {signalled.name} before the ranks could handle it"
    # A failed rank causes failures of other ranks, so the first report names the cause.
    reports = [(path, read_error(path)) for path in find_errors(folder)]
    if signalled is not None:
        ended = f"ended by {signalled.name}"
        reason = f"rank {rank} is lost: it was {ended}"
        return report_lost(folder, EXIT_LOST, reason, f" (rank {rank} was {ended})")
    if not reports or find_verdict(folder) is not None:
        return report_lost(folder, exit_code, f"rank {rank} ended with exit code {exit_code}")
    path, report = reports[0]
    first = int(path.name.removeprefix("rank_").removesuffix(".error.log"))
    place = "" if report.code == EXIT_CONFIGURATION else f"rank {first}: "
    print_redacted(f"error: {place}{report.text}", f"the full traceback is in {path}")
    return report.code, f"{place}{report.text}"


def print_redacted(*lines: str) -> None:
    """Prints lines to stderr with secrets removed."""
    for line in lines:
        print(redact(line), file=sys.stderr, flush=True)


def _signal_of(exit_code: int) -> signal.Signals | None:
    """Returns the signal that ended a rank, or None. A rank that handles SIGTERM exits with 128 + SIGTERM."""
    if exit_code == 128 + signal.SIGTERM:
        return signal.SIGTERM
    return signal.Signals(-exit_code) if exit_code < 0 else None


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Creates a temporary folder that is removed on exit, and removes leftover ones of ended commands."""
    remove_leftovers(Path(tempfile.gettempdir()))
    with TemporaryDirectory(prefix=_SCRATCH_PREFIX, ignore_cleanup_errors=True) as name:
        (Path(name) / _OWNER_NAME).write_text(Owner.of_this_process().to_text(), encoding="utf-8")
        yield Path(name)


def remove_leftovers(place: Path) -> None:
    """Removes leftover folders of this user whose owner on this machine has ended. Follows no links."""
    with suppress(OSError):
        for entry in list(os.scandir(place)):
            with suppress(OSError, LockedError):
                if entry.name.startswith(_SCRATCH_PREFIX) and _is_left_over(entry):
                    shutil.rmtree(entry.path, ignore_errors=True)


def _is_left_over(entry: "os.DirEntry[str]") -> bool:
    if not entry.is_dir(follow_symlinks=False) or entry.stat(follow_symlinks=False).st_uid != os.geteuid():
        return False
    found = read_lock(Path(entry.path) / _OWNER_NAME)
    return found is not None and found.owner is not None and found.owner.is_gone
