"""What a person sees of a command: progress, and text without control characters. No torch here."""

import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TextIO

from base.figures import bytes_text
from data.progress import Progress, Unit

_FIRST_SECONDS = 1.0
_EVERY_SECONDS = 5.0
# C0 except tab and newline, DEL, C1, and the characters that change the direction of text.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    r"""Returns a text with its control characters as escapes, such as `\x1b`. Tabs and line breaks stay."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def printable_on(stream: TextIO, text: str) -> str:
    """Returns what to write below Python's streams: escaped only if the stream is a terminal."""
    return printable(text) if stream.isatty() else text


class EscapedStream:
    """Text stream to a terminal with escaped control characters; `unescaped` is the stream below it."""

    def __init__(self, stream: TextIO) -> None:
        self.unescaped = stream

    def write(self, text: str) -> int:
        """Writes the escaped text, and returns the length of what was given."""
        self.unescaped.write(printable(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Writes each line."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unescaped, name)


def unescaped(stream: TextIO) -> TextIO:
    """Returns the stream below an escaped one, or the stream itself."""
    below: TextIO = getattr(stream, "unescaped", stream)
    return below


def escape_terminals() -> None:
    """Escapes what this process prints from here on, if standard output or error is a terminal."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if getattr(stream, "errors", None) == "strict":
            stream.reconfigure(errors="replace")  # characters that the terminal or the pipe cannot encode
        if stream is not None and not stream.closed and stream.isatty() and not isinstance(stream, EscapedStream):
            setattr(sys, name, EscapedStream(stream))


class ProgressLines(Progress):
    """Progress as plain lines: the first after one second, then at most one every five seconds."""

    def __init__(self, say: Callable[[str], object], clock: Callable[[], float] = time.monotonic) -> None:
        self._say = say
        self._clock = clock

    def note(self, line: str) -> None:
        """Prints the line."""
        self._say(line)

    @contextmanager
    def _display(self, what: str, total: int, unit: Unit) -> Iterator[Callable[[int], object]]:
        began = self._clock()
        due = began + _FIRST_SECONDS
        done = 0
        has_said = False

        def advance(amount: int) -> None:
            nonlocal due, done, has_said
            done += amount
            now = self._clock()
            if now >= due:
                self._say(f"{what}: {progress_text(done, total, now - began, unit)}")
                due = now + _EVERY_SECONDS
                has_said = True

        yield advance
        if has_said:
            self._say(f"{what}: done, {amount_text(done, unit)} in {seconds_text(self._clock() - began)}")


class ProgressBars(Progress):
    """Progress bars on a terminal, removed when the work is done."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    @contextmanager
    def _display(self, what: str, total: int, unit: Unit) -> Iterator[Callable[[int], object]]:
        from rich import progress
        from rich.console import Console

        columns: list[progress.ProgressColumn] = [progress.TextColumn("{task.description}"), progress.BarColumn()]
        if unit == "bytes":
            columns += [progress.DownloadColumn(), progress.TransferSpeedColumn()]
        else:
            columns.append(progress.MofNCompleteColumn())
        console = Console(file=unescaped(self._stream))
        with progress.Progress(*columns, progress.TimeRemainingColumn(), console=console, transient=True) as bars:
            escape_terminals()  # the bar has replaced both streams
            yield partial(bars.advance, bars.add_task(printable(what), total=total))

    def note(self, line: str) -> None:
        """Writes the line; a bar that is shown moves below it."""
        print(printable(line), file=self._stream, flush=True)


def progress_on(stream: TextIO | None = None) -> Progress:
    """Returns bars if the stream is a terminal, otherwise lines. The default stream is standard error."""
    target = sys.stderr if stream is None else stream
    return ProgressBars(target) if target.isatty() else ProgressLines(lambda line: print(line, file=target, flush=True))


def progress_text(done: int, total: int, seconds: float, unit: Unit = "bytes") -> str:
    """Formats the progress with rate and remaining time: `12.4 MB of 52.4 MB, 24 %, 2.3 MB/s, 17 s left`."""
    share = min(done / max(total, 1), 1.0)
    left = seconds * (1.0 - share) / share if share else 0.0
    total_text = amount_text(max(total, done), unit)
    counted = f"{amount_text(done, unit) if unit == 'bytes' else f'{done:,}'} of {total_text}"
    rate = f", {bytes_text(done / seconds)}/s" if unit == "bytes" and seconds else ""
    return f"{counted}, {share:.0%}".replace("%", " %") + (f"{rate}, {seconds_text(left)} left" if share else "")


def amount_text(amount: int, unit: Unit) -> str:
    """Formats a number of bytes, or a count with its unit."""
    return bytes_text(amount) if unit == "bytes" else f"{amount:,} {unit}"


def seconds_text(seconds: float) -> str:
    """Formats a duration in seconds, minutes or hours."""
    minutes = int(seconds) // 60
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min" if minutes else f"{seconds:.0f} s"
