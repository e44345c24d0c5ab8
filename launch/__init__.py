"""Commands: `python -m launch.NAME`.

Ctrl-C ends them with one line and exit code 130, from the first import on.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from kernels import share_comm

EXIT_INTERRUPTED = 128 + signal.SIGINT
LINE = "interrupted"
# A second Ctrl-C within this time is ignored, so that the cleanup that the first one started can finish.
_CLEANUP_SECONDS = 3.0


def exit_on_interrupt() -> None:
    """Makes Ctrl-C end this process without a traceback, unless the process handles or ignores it."""
    is_plain = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_plain and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _end)


@contextmanager
def signals_handled(handlers: Mapping[int, Callable[[int, FrameType | None], object]]) -> Iterator[None]:
    """Handles signals until exit. Does nothing in other threads than the main one, which alone can."""
    is_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()} if is_main else {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def unwound_by_signals() -> Iterator[None]:
    """Turns SIGTERM and SIGHUP into SystemExit until exit, so that cleanup code removes partial files."""

    def unwind(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second signal must not interrupt the cleanup
        raise SystemExit(128 + number)

    # A signal that is ignored, as under nohup, stays ignored.
    ending = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    with signals_handled(dict.fromkeys(ending, unwind)):
        yield


class Interrupts:
    """Handler for Ctrl-C while a command runs. The first one raises KeyboardInterrupt for a cleanup."""

    def __init__(self) -> None:
        self.is_interrupted = False
        self._interrupted_at = 0.0
        self.resume()

    def resume(self) -> None:
        """Installs the handler again, after another library replaced it."""
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            signal.signal(signal.SIGINT, self)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handles the signal."""
        if self.is_interrupted:
            if time.monotonic() - self._interrupted_at > _CLEANUP_SECONDS:
                _end(number, frame)
            return
        self.is_interrupted = True
        self._interrupted_at = time.monotonic()
        # Libraries that are interrupted during an import or in a destructor would print long messages.
        sys.unraisablehook = lambda unraisable: None
        raise KeyboardInterrupt


def _end(number: int, frame: FrameType | None) -> NoReturn:
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):
            os.write(2, f"{LINE}\n".encode())
    os._exit(EXIT_INTERRUPTED)


# `python -m launch.NAME` imports this package before the command's module and before any slow import.
if sys.argv[:1] == ["-m"]:
    exit_on_interrupt()

share_comm()
