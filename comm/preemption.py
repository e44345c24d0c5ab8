"""Whether a process is to be preempted. No torch here: it is imported before anything else."""

import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""Signals of a scheduler, and of a terminal that is closed."""


def handled_signals() -> tuple[signal.Signals, ...]:
    """Returns those of `SIGNALS` that this process handles: under nohup SIGHUP is ignored, and stays so."""
    is_ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return tuple(number for number in SIGNALS if number != signal.SIGHUP or not is_ignored)


class Preemption:
    """Notes a request, and nothing else: ranks agree on it at a point where each of them can leave.

    An instance is the process' handler of `SIGNALS`; any number of them may come, at any time.
    """

    def __init__(self) -> None:
        """Starts without a request."""
        self._number = 0
        self._is_requested = False

    @classmethod
    def of_process(cls) -> "Preemption":
        """Returns this process's instance, on its main thread. From then on, signals do not end the process."""
        known = signal.getsignal(signal.SIGTERM)
        if isinstance(known, cls):
            return known
        made = cls()
        for number in handled_signals():
            signal.signal(number, made)
            # An interrupted system call is resumed: not every library retries it.
            signal.siginterrupt(number, False)
        return made

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Takes a signal."""
        self._number = self._number or number

    def request(self) -> None:
        """Has the ranks leave together as if a signal had come."""
        self._is_requested = True

    @property
    def is_requested(self) -> bool:
        """Whether a signal came, or the process itself requested it."""
        return self._number != 0 or self._is_requested

    @property
    def signal_name(self) -> str:
        """Name of the first signal; empty if there was none."""
        return signal.Signals(self._number).name if self._number else ""
