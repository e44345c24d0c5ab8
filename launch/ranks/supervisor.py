"""Beside the elastic launcher: asks local ranks to make room, and ends those that go on alone."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from comm.exit_codes import EXIT_HANG, EXIT_LOST
from comm.preemption import Preemption
from train.errors import find_errors, read_error

_LOOK_SECONDS = 0.25
# After the first rank's last words, by which the others should know, or learn from the launcher. The elastic launcher
# would give each of them 30, and a stopped one takes all it is given.
_VERDICT_SECONDS = 1.2
_ERROR_SECONDS = 3.0
# After a rank has vanished, by which the others should have a verdict.
_VANISHED_SECONDS = 4.0


class Keeper:
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
        self._asked: set[Path] = set()
        self._asked_at: float | None = None
        self._vanished_at: float | None = None
        self._is_over = threading.Event()
        self.is_out_of_patience = False

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Works meanwhile, where the system can tell a process from another that took its number."""
        if not hasattr(os, "pidfd_open"):
            yield
            return
        thread = threading.Thread(target=self._keep, name="keeper", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._is_over.set()
            thread.join()
            for descriptor in self._ranks.values():
                os.close(descriptor)

    def end_ranks_soon(self) -> None:
        """Ends all ranks that are left after a few seconds, as one has vanished."""
        self._vanished_at = time.monotonic()

    def _keep(self) -> None:
        while not self._is_over.wait(_LOOK_SECONDS):
            self._meet()
            if self._request.is_requested:
                self._ask()
            if self._is_time_up():
                for descriptor in self._ranks.values():
                    _send(descriptor, signal.SIGKILL)

    def _meet(self) -> None:
        for path in self.scratch.glob("pid_*"):
            if path not in self._ranks:
                # A number may be another process' by then; an open descriptor never is.
                with suppress(ProcessLookupError):
                    self._ranks[path] = os.pidfd_open(int(path.name.removeprefix("pid_")))

    def _ask(self) -> None:
        """Each rank once."""
        if self._asked_at is None:
            self._asked_at = time.monotonic()
        for path in self._ranks.keys() - self._asked:
            self._asked.add(path)
            _send(self._ranks[path], signal.Signals[self._request.signal_name])

    def _is_time_up(self) -> bool:
        """Whether ranks go on for too long, after another has left its last words or all were asked to end."""
        if self._asked_at is not None and time.monotonic() - self._asked_at > self._grace_seconds:
            self.is_out_of_patience = True
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
