"""Progress of long work, which a display may show. Imports no torch."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Literal, TypeVar

Item = TypeVar("Item")
Unit = Literal["bytes", "phases", "batches", "tokens"]


class Progress:
    """Progress over iterables, of which this class shows nothing."""

    def over(
        self, what: str, items: Iterable[Item], total: int, size: Callable[[Item], int], unit: Unit = "bytes"
    ) -> Iterator[Item]:
        """Yields the items and shows the progress; `total` is the sum of all sizes, or an estimate."""
        with self._display(what, total, unit) as advance:
            for item in items:
                yield item
                advance(size(item))

    def note(self, line: str) -> None:
        """Shows a line that the user must see."""

    @contextmanager
    def _display(self, what: str, total: int, unit: Unit) -> Iterator[Callable[[int], object]]:
        """Opens the display of some work, and yields what is called with the size of each item that is done."""
        yield lambda amount: None


NO_PROGRESS = Progress()
