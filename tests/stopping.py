"""Ends a test run within seconds of SIGTERM or Ctrl-C, and removes its processes and temporary folders."""

import atexit
import os
import shutil
import signal
import tempfile
import threading
import time
from contextlib import suppress
from multiprocessing import util
from pathlib import Path
from types import FrameType

_SECONDS = 5.0
"""For fixtures to end what they started; then this process ends as it is."""
_MORE_SECONDS = 3.0
"""That the process which started xdist's workers waits for them."""


class Stop:
    """Signal handler that ends the tests of this process and of its xdist workers."""

    def __init__(self, *, is_worker: bool) -> None:
        self._is_worker = is_worker
        self._started: dict[int, str] = {}
        self._pid = os.getpid()

    def install(self) -> None:
        """Installs the handler for both signals."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Raises KeyboardInterrupt, so that pytest tears down its fixtures. Further signals have no effect."""
        if os.getpid() != self._pid:  # a fork of a test
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        self._started = descendants(os.getpid())
        if not self._is_worker:
            _interrupt_workers()
        threading.Thread(target=self._end_late, args=(number,), daemon=True).start()
        atexit.register(self.kill_left)
        raise KeyboardInterrupt

    def _end_late(self, number: int) -> None:
        time.sleep(_SECONDS if self._is_worker else _SECONDS + _MORE_SECONDS)
        self.kill_left()
        remove_folder()
        os._exit(128 + number)

    def kill_left(self) -> None:
        """Kills all processes that this process and its children started and that still run."""
        for pid, started in {**descendants(os.getpid()), **self._started}.items():
            if _start_of(pid) == started:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def descendants(root: int) -> dict[int, str]:
    """Returns the running descendants of a process with their start times; empty without /proc."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # ended meanwhile
            parents[int(path.parent.name)] = int(path.read_text().rsplit(")", 1)[1].split()[1])
    found, added = {root}, {root}
    while added:
        added = {pid for pid, parent in parents.items() if parent in added} - found
        found |= added
    return {pid: _start_of(pid) for pid in found - {root}}


def _start_of(pid: int) -> str:
    """Returns when a process started, in ticks, which detects a reused pid. Empty if the process has ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    return ""


def _interrupt_workers() -> None:
    """Forwards SIGTERM to the workers; Ctrl-C reaches them anyway."""
    for pid in _children(os.getpid()):
        with suppress(OSError):
            if b"PYTEST_XDIST_WORKER=" in Path(f"/proc/{pid}/environ").read_bytes() or _is_execnet(pid):
                os.kill(pid, signal.SIGTERM)


def _children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


def _is_execnet(pid: int) -> bool:
    """Returns whether a process is an xdist worker, which runs execnet's first line."""
    return b"exec(eval(sys.stdin.readline()))" in Path(f"/proc/{pid}/cmdline").read_bytes()


_folder: dict[int, str] = {}
"""By the process that made it."""


def make_folder() -> None:
    """Creates a folder for temporary files of this run, which is removed with everything that killed processes leave.

    Folders of `tmp_path` stay in the place where pytest keeps those of the last runs.
    """
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
    path = _folder[os.getpid()] = tempfile.mkdtemp(prefix="tests")
    os.chmod(path, 0o1777)  # as /tmp, for commands that run as another user
    os.environ["TMPDIR"] = tempfile.tempdir = path
    util.Finalize(None, remove_folder, exitpriority=-200)  # after multiprocessing has removed its own, at -100


def remove_folder() -> None:
    """Removes the folder of `make_folder` in the process that made it, not in a fork of it."""
    if os.getpid() in _folder:
        shutil.rmtree(_folder[os.getpid()], ignore_errors=True)
