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
from types import FrameType, TracebackType
from typing import NoReturn

_ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))


def _end_without_environment(reason: str) -> NoReturn:
    """Ends the command with one line that says how to get an environment, and exit code 2."""
    environment = os.path.join(_ROOT, ".venv")
    is_active = os.path.realpath(sys.prefix) == os.path.realpath(environment)
    steps = ["rm -f .venv/installed"] if is_active else []
    if is_active or not os.path.exists(os.path.join(environment, "installed")):
        steps.append("make .venv/installed")
    advice = " && ".join([*steps, "source .venv/bin/activate"])
    sys.stdout.flush()
    print(f"error: {reason}; nearest valid: {advice}", file=sys.stderr, flush=True)
    os._exit(2)  # sys.exit would not end a hook of exceptions with this code


_IS_COMMAND = sys.argv[:1] == ["-m"]
"""Whether `python -m launch.NAME` imports this package, before the command's module and before any slow import."""

# An older Python gets here: syntax and imports above are those of Python 3.8.
if _IS_COMMAND and not (3, 11) <= sys.version_info[:2] <= (3, 13):
    _end_without_environment("Python: must be 3.11 to 3.13, is {}.{}".format(*sys.version_info))

from base import share_comm  # noqa: E402

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


def _name_missing_package(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Ends the command if a package is missing, and prints the traceback of all other errors."""
    name = (getattr(error, "name", None) or "").partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and name not in ("", *os.listdir(_ROOT)):
        _end_without_environment(f"{name}: must be installed, {sys.executable} does not have it")
    sys.__excepthook__(kind, error, trace)


if _IS_COMMAND:
    sys.excepthook = _name_missing_package
    exit_on_interrupt()

share_comm()
