"""Runs calls in threads, and abandons those that take too long.

A thread cannot be killed. One that hangs is replaced by another one, and its result is ignored.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Returned(Generic[T]):
    """The value that a call returned."""

    value: T


@dataclass(frozen=True, slots=True)
class Raised:
    """The error that a call raised."""

    error: Exception


@dataclass(frozen=True, slots=True)
class Abandoned:
    """A call that did not return within its time, and the number of its thread, from 1."""

    thread: int


CallResult = Returned[T] | Raised | Abandoned


class TooManyAbandonedError(Exception):
    """Twice as many calls as there are threads were abandoned, and none returned in between."""


def run_in_threads(
    calls: Sequence[Callable[[], T]], num_threads: int, seconds: float | None, fatal: type[Exception]
) -> list[CallResult[T]]:
    """Runs calls, several at a time.

    Args:
        calls: may run in any order and on any thread.
        num_threads: number of calls that run at the same time.
        seconds: time of a call after its start, after which it is abandoned; None: no limit.
        fatal: type of errors that end all calls.

    Returns:
        The results in the order of the calls.

    Raises:
        TooManyAbandonedError: see there.
        Exception: the first fatal error that a call raised.
    """
    run = _Run(calls, fatal)
    try:
        for _ in range(min(num_threads, len(calls))):
            run.start_thread()
        return run.wait(seconds, max_abandoned=2 * num_threads)
    finally:
        run.stop()


class _Run(Generic[T]):
    """Calls that are waiting, running or done. One lock guards all fields."""

    def __init__(self, calls: Sequence[Callable[[], T]], fatal: type[Exception]) -> None:
        self._calls, self._fatal = calls, fatal
        self._changed = threading.Condition()
        self._waiting = deque(range(len(calls)))
        self._running: dict[int, tuple[int, float]] = {}
        self._results: dict[int, CallResult[T]] = {}
        self._num_threads = 0
        self._num_abandoned = 0
        self._fatal_error: Exception | None = None

    def start_thread(self) -> None:
        """Starts a thread. It is a daemon, so that one that hangs does not keep the process from ending."""
        self._num_threads += 1
        threading.Thread(target=self._work, args=(self._num_threads,), name="scoring", daemon=True).start()

    def wait(self, seconds: float | None, max_abandoned: int) -> list[CallResult[T]]:
        """Returns all results, and abandons calls that take too long."""
        with self._changed:
            while True:
                if self._fatal_error is not None:
                    raise self._fatal_error
                if len(self._results) == len(self._calls):
                    return [self._results[number] for number in range(len(self._calls))]
                if self._num_abandoned >= max_abandoned:
                    raise TooManyAbandonedError
                left = None if seconds is None else self._abandon_late(seconds)
                if left is None or left > 0:
                    self._changed.wait(left)

    def stop(self) -> None:
        """Lets no further call start."""
        with self._changed:
            self._waiting.clear()

    def _abandon_late(self, seconds: float) -> float:
        """Abandons calls that are late. Returns the time until the next one would be."""
        now = time.monotonic()
        for number, (thread, began) in list(self._running.items()):
            if now - began >= seconds:
                del self._running[number]
                self._results[number] = Abandoned(thread)
                self._num_abandoned += 1
                self.start_thread()
        if len(self._results) == len(self._calls):
            return 0.0
        return seconds - max((now - began for _, began in self._running.values()), default=0.0)

    def _work(self, thread: int) -> None:
        while True:
            with self._changed:
                if not self._waiting:
                    return
                number = self._waiting.popleft()
                self._running[number] = thread, time.monotonic()
                self._changed.notify()
            try:
                result: CallResult[T] = Returned(self._calls[number]())
            except Exception as error:
                result = Raised(error)
            with self._changed:
                if number not in self._running:
                    return  # abandoned; another thread took its place
                del self._running[number]
                self._results[number] = result
                self._num_abandoned = 0
                if isinstance(result, Raised) and isinstance(result.error, self._fatal):
                    self._fatal_error = result.error
                self._changed.notify()
