"""How what owns threads is left."""

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self


class ClosesOnSuccess(ABC):
    """A context manager that closes on a regular exit only.

    An error on the way out joins nothing: a thread may be inside a collective whose peers wait for this
    very rank, and the process must be able to leave and tell.
    """

    @abstractmethod
    def close(self) -> None:
        """Waits for what is under way and ends the threads."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
