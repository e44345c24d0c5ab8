"""Pipes between processes, closed by a context manager."""

import os
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PipePair:
    """The file descriptors of a pipe."""

    reader: int
    writer: int


class Pipes:
    """Pipes that a context manager closes."""

    def __init__(self, count: int) -> None:
        """Opens the pipes."""
        self.pairs = tuple(PipePair(*os.pipe()) for _ in range(count))
        self._open = {descriptor for pair in self.pairs for descriptor in (pair.reader, pair.writer)}

    def __enter__(self) -> "Pipes":
        return self

    def __exit__(self, *_: object) -> None:
        self.close(*self._open)

    def close(self, *descriptors: int) -> None:
        """Closes some of the file descriptors."""
        for descriptor in descriptors:
            self._open.remove(descriptor)
            os.close(descriptor)
