"""How far long work is: a bar on a terminal, a line every few seconds elsewhere. No torch here."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TextIO, TypeVar

Item = TypeVar("Item")
_FIRST_SECONDS = 1.0
_EVERY_SECONDS = 5.0


class Progress(Protocol):
    """Shows how far named work is."""

    def over(self, what: str, items: Iterable[Item], total: int, size: Callable[[Item], int]) -> Iterator[Item]:
        """Yields the items, and shows how far they are.

        Args:
            what: the work, for people.
            items: worked on one after the other.
            total: sum of all sizes, or an estimate of it.
            size: of one item, in bytes.
        """
        ...


class Quiet:
    """Shows nothing."""

    def over(self, what: str, items: Iterable[Item], total: int, size: Callable[[Item], int]) -> Iterator[Item]:
        """Yields the items."""
        yield from items


class Lines:
    """Plain lines: none of work that takes less than a second, then one every five seconds at most."""

    def __init__(self, say: Callable[[str], object], clock: Callable[[], float] = time.monotonic) -> None:
        """`say` takes a line; `clock` gives seconds."""
        self._say = say
        self._clock = clock

    def over(self, what: str, items: Iterable[Item], total: int, size: Callable[[Item], int]) -> Iterator[Item]:
        """Yields the items; see `Progress`."""
        began = self._clock()
        due, done, has_said = began + _FIRST_SECONDS, 0, False
        for item in items:
            yield item
            done += size(item)
            now = self._clock()
            if now >= due:
                self._say(f"{what}: {progress_text(done, total, now - began)}")
                due, has_said = now + _EVERY_SECONDS, True
        if has_said:
            self._say(f"{what}: done, {bytes_text(done)} in {seconds_text(self._clock() - began)}")


class Bars:
    """A bar for each work on a terminal, which goes when the work is done."""

    def __init__(self, stream: TextIO) -> None:
        """`stream`: the terminal."""
        self._stream = stream

    def over(self, what: str, items: Iterable[Item], total: int, size: Callable[[Item], int]) -> Iterator[Item]:
        """Yields the items; see `Progress`."""
        with _bar(self._stream, what, total) as advance:
            for item in items:
                yield item
                advance(size(item))


def progress_on(stream: TextIO | None = None) -> Progress:
    """Returns bars if a stream is a terminal, and lines otherwise. The default is standard error as it is now."""
    target = sys.stderr if stream is None else stream
    return Bars(target) if target.isatty() else Lines(lambda line: print(line, file=target, flush=True))


def progress_text(done: int, total: int, seconds: float) -> str:
    """Returns how far work is, in bytes, percent and remaining time: `12.0 MB of 52.4 MB, 23 %, 17 s left`."""
    share = min(done / max(total, 1), 1.0)
    left = seconds * (1.0 - share) / share if share else 0.0
    return f"{bytes_text(done)} of {bytes_text(max(total, done))}, {share:.0%}".replace("%", " %") + (
        f", {seconds_text(left)} left" if share else ""
    )


def bytes_text(num_bytes: int) -> str:
    """Returns a number of bytes for people."""
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"


def seconds_text(seconds: float) -> str:
    """Returns a duration for people."""
    minutes = int(seconds) // 60
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min" if minutes else f"{seconds:.0f} s"


@contextmanager
def _bar(stream: TextIO, what: str, total: int) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Shown

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Shown(*columns, console=Console(file=stream), transient=True) as shown:
        task = shown.add_task(what, total=total)
        yield lambda count: shown.advance(task, count)
