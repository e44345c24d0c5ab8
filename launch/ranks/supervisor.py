"""Supervises a command's ranks next to torch's elastic launcher, and reports why they failed.

It requests preemption of local ranks, ends those that go on alone, and finds those that the launcher would wait
for forever.
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
from pathlib import Path
from tempfile import TemporaryDirectory

from comm.exit_codes import EXIT_HANG, EXIT_LOST
from comm.preemption import Preemption
from launch.command import EXIT_CONFIGURATION
from launch.ranks.interrupt import EXIT_INTERRUPTED
from train.errors import find_errors, find_verdict, read_error
from train.ownership.lock_file import LockedError, read_lock
from train.ownership.owner import Owner
from train.records.secrets import redact

PID_PREFIX = "pid_"
_SCRATCH_PREFIX = "launch-"
_OWNER_NAME = "owner.json"
_LOOK_SECONDS = 0.25
# After the first rank's last words, by which the others should know, or learn from the launcher. The elastic launcher
# would give each of them 30, and a stopped one takes all it is given.
_VERDICT_SECONDS = 1.2
_ERROR_SECONDS = 3.0
# After a rank has vanished, by which the others should have a verdict.
_VANISHED_SECONDS = 4.0


class RankSupervisor:
    """A thread beside the launcher's. Each rank leaves a file `pid_*` in `scratch`, by which it is known."""

    def __init__(self, folder: Path, scratch: Path, request: Preemption, grace_seconds: float) -> None:
        """Not at work yet.

        Args:
            folder: of the run, where ranks leave their last words.
            scratch: of this life of the ranks.
            request: to make room; handed on to every rank once it comes.
            grace_seconds: that ranks have from there on.
        """
        self._folder = folder
        self.scratch = scratch
        self._request = request
        self._grace_seconds = grace_seconds
        self._ranks: dict[Path, int] = {}
        self._signalled: set[Path] = set()
        self._requested_at: float | None = None
        self._vanished_at: float | None = None
        self._is_over = threading.Event()
        self.has_grace_expired = False

    @contextmanager
    def running(self) -> Iterator[None]:
        """Works meanwhile, where the system can tell a process from another that took its number."""
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

    def end_ranks_after_delay(self) -> None:
        """Ends all ranks that are left after a few seconds, as one has vanished."""
        self._vanished_at = time.monotonic()

    def _supervise(self) -> None:
        while not self._is_over.wait(_LOOK_SECONDS):
            self._find_ranks()
            if self._request.is_requested:
                self._forward_request()
            if self._is_time_up():
                for descriptor in self._ranks.values():
                    _send(descriptor, signal.SIGKILL)

    def _find_ranks(self) -> None:
        for path in self.scratch.glob(f"{PID_PREFIX}*"):
            if path not in self._ranks:
                # A number may be another process' by then; an open descriptor never is.
                with suppress(ProcessLookupError):
                    self._ranks[path] = os.pidfd_open(pid_of(path))

    def _forward_request(self) -> None:
        """Each rank once."""
        if self._requested_at is None:
            self._requested_at = time.monotonic()
        for path in self._ranks.keys() - self._signalled:
            self._signalled.add(path)
            _send(self._ranks[path], signal.Signals[self._request.signal_name])

    def _is_time_up(self) -> bool:
        """Whether ranks go on for too long, after another has left its last words or all were asked to end."""
        if self._requested_at is not None and time.monotonic() - self._requested_at > self._grace_seconds:
            self.has_grace_expired = True
            return True
        if self._vanished_at is not None and time.monotonic() - self._vanished_at > _VANISHED_SECONDS:
            return True
        try:
            paths = find_errors(self._folder)
            is_known = any(read_error(path).code in (EXIT_HANG, EXIT_LOST) for path in paths)
            grace = _VERDICT_SECONDS if is_known else _ERROR_SECONDS
            return bool(paths) and time.time() - paths[0].stat().st_mtime > grace
        except FileNotFoundError:  # the run's folder was deleted at this moment
            return False


def _send(descriptor: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(descriptor, number)


class VanishedError(RuntimeError):
    """Ranks have ended with exit code 0 and left no result."""


class RankCheck:
    """Finds ranks that ended with exit code 0 and left no result: torch's launcher takes them for well.

    To be called after each look that the launcher takes at its ranks. Between two calls it finds every rank that ended
    with another code, and a rank that left its result stays until all have. So a rank that is missing twice has
    vanished.
    """

    def __init__(self, world_size: int, supervisor: RankSupervisor) -> None:
        """Expects `world_size` ranks, each with a file `pid_*` that holds its rank in the supervisor's folder."""
        self._world_size = world_size
        self._supervisor = supervisor
        self._num_missing = 0

    def __call__(self) -> None:
        """Looks once.

        Raises:
            VanishedError: ranks were missing the last time, and still are.
        """
        alive = {child.pid for child in multiprocessing.active_children()}
        num_missing = self._world_size - len(alive)
        if num_missing > 0 and self._num_missing > 0:
            self._supervisor.end_ranks_after_delay()
            from comm.watchdog.verdict import name_ranks

            ranks = name_ranks(self._ranks_without(alive))
            raise VanishedError(f"{ranks} ended with exit code 0 before the run was done")
        self._num_missing = num_missing

    def _ranks_without(self, alive: set[int | None]) -> list[int]:
        return sorted(
            int(path.read_text())
            for path in self._supervisor.scratch.glob(f"{PID_PREFIX}*")
            if pid_of(path) not in alive
        )


def write_pid_file(scratch: Path, pid: int, rank: int) -> None:
    """Writes the file by which a rank's process is known, complete or not at all."""
    partial = scratch / f"partial_{pid}"
    partial.write_text(str(rank))
    partial.rename(scratch / f"{PID_PREFIX}{pid}")


def pid_of(path: Path) -> int:
    """Returns the process number that a file of `write_pid_file` stands for."""
    return int(path.name.removeprefix(PID_PREFIX))


def report_vanished(folder: Path, reason: str) -> tuple[int, str]:
    """Reports ranks that ended without a result: by the verdict of the others, if there is one."""
    if (verdict := find_verdict(folder)) is None:
        print_redacted(f"error: {reason}")
        return EXIT_LOST, reason
    print_redacted(f"error: {verdict[1].text}", f"what each rank did last is in {verdict[0].parent}")
    return verdict[1].code, verdict[1].text


def report_failure(folder: Path, rank: int, exit_code: int, request: Preemption) -> tuple[int, str]:
    """Prints once and shortly which rank failed first, and why. Returns the run's exit code and the reason.

    Args:
        folder: of the run.
        rank: that the launcher saw fail first.
        exit_code: of its process; -n if signal n ended it.
        request: whether the run was asked to end.
    """
    signalled = _signal_of(exit_code)
    if signalled is signal.SIGINT:
        return EXIT_INTERRUPTED, "ended by SIGINT"
    if signalled is not None and signalled.name == request.signal_name:
        return 128 + signalled, f"ended by {signalled.name}, which they did not heed yet"
    # A rank that fails takes others with it: the first to say so is the cause.
    words = [(path, read_error(path)) for path in find_errors(folder)]
    if (verdict := find_verdict(folder)) is not None:
        path, word = verdict
        ended = f" (rank {rank} was ended by {signalled.name})" if signalled else ""
        print_redacted(f"error: {word.text}{ended}", f"what each rank did last is in {path.parent}")
        return word.code, f"{word.text}{ended}"
    if signalled is not None:
        reason = f"rank {rank} is lost: it was ended by {signalled.name}"
        print_redacted(f"error: {reason}")
        return EXIT_LOST, reason
    if not words:
        reason = f"rank {rank} ended with exit code {exit_code}"
        print_redacted(f"error: {reason}")
        return exit_code, reason
    path, word = words[0]
    first = int(path.name.removeprefix("rank_").removesuffix(".error.log"))
    place = "" if word.code == EXIT_CONFIGURATION else f"rank {first}: "
    print_redacted(f"error: {place}{word.text}", f"the whole traceback is in {path}")
    return word.code, f"{place}{word.text}"


def print_redacted(*lines: str) -> None:
    for line in lines:
        print(redact(line), file=sys.stderr, flush=True)


def _signal_of(exit_code: int) -> signal.Signals | None:
    """The signal that ended a rank; one that heeds SIGTERM leaves by itself, as a shell would tell of it."""
    if exit_code == 128 + signal.SIGTERM:
        return signal.SIGTERM
    return signal.Signals(-exit_code) if exit_code < 0 else None


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Makes a folder that is gone afterwards, and removes those of commands that have ended."""
    remove_leftovers(Path(tempfile.gettempdir()))
    with TemporaryDirectory(prefix=_SCRATCH_PREFIX, ignore_cleanup_errors=True) as name:
        (Path(name) / _OWNER_NAME).write_text(Owner.of_this_process().to_text(), encoding="utf-8")
        yield Path(name)


def remove_leftovers(place: Path) -> None:
    """Removes folders of this user whose owner was a process of this machine and has ended. Follows no links.

    Args:
        place: folder for temporary files, which other users may write too.
    """
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
