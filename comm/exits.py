"""Defines exit codes, which report why a rank's process ended, and records that it is to be preempted.

Does not import torch, as it is imported first.
"""

import signal
from contextlib import suppress
from pathlib import Path
from types import FrameType

EXIT_CONFIGURATION = 2  # refused; no step was made
EXIT_OTHER = 1  # another rank failed with an error
EXIT_UNVERIFIED = 3  # a check of `launch.verify` failed, or weights differ in `launch.convert check=`
EXIT_PREEMPTED = 75  # preempted after saving
EXIT_HANG = 76  # a rank did not reach a collective within the timeout
EXIT_NON_FINITE = 77  # the guard stopped the run
EXIT_LOST = 78  # a rank's process has ended
EXIT_MEMORY = 79  # a rank's device had too little memory
STOPPED_LOOKS = 10  # about a second each, after which a stopped process is lost


def is_stopped(pid: int | None) -> bool:
    """Returns whether a signal has stopped a process."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()[0] == "T"
    return False


SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)  # signals that a scheduler or a closing terminal sends


def handled_signals() -> tuple[signal.Signals, ...]:
    """Returns the `SIGNALS` that this process handles. Under nohup, SIGHUP stays ignored."""
    is_ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return tuple(number for number in SIGNALS if number != signal.SIGHUP or not is_ignored)


class Preemption:
    """Records a request for preemption, on which ranks act together; handles `SIGNALS` at any time."""

    def __init__(self) -> None:
        self._number = 0
        self._is_requested = False

    @classmethod
    def of_process(cls) -> "Preemption":
        """Returns the process' instance and installs it on the main thread; signals no longer end the process."""
        handler = signal.getsignal(signal.SIGTERM)
        if isinstance(handler, cls):
            return handler
        preemption = cls()
        for number in handled_signals():
            signal.signal(number, preemption)
            # Resume interrupted system calls: not every library retries them.
            interrupts_calls = False
            signal.siginterrupt(number, interrupts_calls)
        return preemption

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Records a signal."""
        self._number = self._number or number

    def request(self) -> None:
        """Requests preemption as if a signal had arrived."""
        self._is_requested = True

    @property
    def is_requested(self) -> bool:
        """Whether a signal arrived, or `request` was called."""
        return self._number != 0 or self._is_requested

    @property
    def signal_name(self) -> str:
        """Name of the first signal; empty if there was none."""
        return signal.Signals(self._number).name if self._number else ""
