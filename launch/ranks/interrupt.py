"""Ctrl-C: one line and exit code 130, from the first moment that a command runs Python code of this project."""

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import NoReturn

EXIT_INTERRUPTED = 128 + signal.SIGINT
LINE = "interrupted"
# A second Ctrl-C that comes sooner is one of an impatient user: what the first one has begun to clean up goes on.
_CLEANUP_SECONDS = 3.0


def exit_on_interrupt() -> None:
    """Has Ctrl-C end this process without a traceback: while a command is imported, there is nothing to clean up.

    Changes nothing for a process that handles or ignores Ctrl-C by itself.
    """
    if _is_plain() and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _end)


class Interrupts:
    """Handler of Ctrl-C while a command runs: the first raises KeyboardInterrupt, so that the command cleans up.

    Attributes: `is_interrupted`, whether there was one.
    """

    is_interrupted: bool

    def __init__(self) -> None:
        """Handles Ctrl-C from here on, unless this process ignores it or handles it otherwise."""
        self.is_interrupted = False
        self._interrupted_at = 0.0
        self.resume()

    def resume(self) -> None:
        """Handles it again, after another library did."""
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            signal.signal(signal.SIGINT, self)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Takes the signal."""
        if self.is_interrupted:
            if time.monotonic() - self._interrupted_at > _CLEANUP_SECONDS:
                _end(number, frame)
            return
        self.is_interrupted, self._interrupted_at = True, time.monotonic()
        # Libraries that are interrupted amid an import or a destructor would say so at length.
        sys.unraisablehook = lambda unraisable: None
        raise KeyboardInterrupt


def _is_plain() -> bool:
    return signal.getsignal(signal.SIGINT) is signal.default_int_handler


def _end(number: int, frame: FrameType | None) -> NoReturn:
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):
            os.write(2, f"{LINE}\n".encode())
    os._exit(EXIT_INTERRUPTED)
