"""Standard output and error of a run, which may break without an end of the run. No torch here."""

import os
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, TextIO

from data.progress import escape_terminals, unescaped

Report = Callable[[str], None]


class GuardedStream:
    """Text stream that drops what it cannot write.

    At the first failure, its descriptor is redirected to the null device, so that libraries, child processes and the
    interpreter's exit can still write to it.
    """

    def __init__(self, stream: TextIO, name: str) -> None:
        """Wraps a stream with or without a descriptor, named stdout or stderr."""
        self._stream = stream
        self._name = name
        self._problem = ""
        self._report: Report | None = None

    def write(self, text: str) -> int:
        """Writes, or loses the text."""
        try:
            return self._stream.write(text)
        except (OSError, ValueError) as error:
            self._break(error)
            return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Writes each of them."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flushes, or loses what was not written."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._break(error)

    def report_to(self, report: Report) -> None:
        """Has a failure reported once: the one that there was, or the one that comes."""
        self._report = report
        if self._problem:
            report(self._problem)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _break(self, error: Exception) -> None:
        if self._problem or isinstance(error, BlockingIOError):  # a pipe that is full may have room again
            return
        said = getattr(error, "strerror", None) or str(error)
        self._problem = f"{self._name} cannot be written ({said}); the run continues without it"
        with suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
        if self._report is not None:
            self._report(self._problem)


def guard_terminal() -> None:
    """Guards standard output and error, opens closed ones, and escapes control characters."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # the next file that is opened would get the number, and what is printed
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = unescaped(getattr(sys, name) or open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        setattr(sys, name, stream if isinstance(stream, GuardedStream) else GuardedStream(stream, name))
    escape_terminals()


def report_breaks(report: Report) -> None:
    """Has failures of guarded streams reported, each once, on the thread that writes."""
    for stream in (unescaped(sys.stdout), unescaped(sys.stderr)):
        if isinstance(stream, GuardedStream):
            stream.report_to(report)
