"""Where exchanges run next to computation: a worker thread on CPU, a stream on CUDA, or inline."""

import queue
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

from comm.protocol import Work

T = TypeVar("T")


class ClosesOnSuccess(ABC):
    """A context manager that closes on a regular exit only.

    An error on the way out joins nothing: a thread may be inside a collective whose peers wait for this
    very rank, and the process must be able to report the error and exit.
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


class Lane(Protocol):
    """Runs functions in the order in which they were submitted, without recording gradients."""

    def submit(self, function: Callable[[], T]) -> Work[T]:
        """Starts `function` once everything submitted before is through; what it holds lives until it is done."""
        ...

    def close(self) -> None:
        """Waits for what was submitted. Nothing may be submitted afterwards."""
        ...


class CompletedWork(Generic[T]):
    """Work that was complete when it was made."""

    def __init__(self, result: T) -> None:
        self._result = result

    def wait(self) -> T:
        """Returns the result."""
        return self._result


class InlineLane:
    """Runs each function at once, on the caller's thread: the sequential mode. Errors come from `submit`."""

    def submit(self, function: Callable[[], T]) -> Work[T]:
        """Runs `function`."""
        with torch.no_grad():
            return CompletedWork(function())

    def close(self) -> None:
        """Does nothing: nothing is ever pending."""


class _Job(Generic[T]):
    """A function on a worker thread. The lock is held until it has returned or raised."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function: Callable[[], T] | None = function
        self._results: list[T] = []
        self._error: BaseException | None = None
        self._running = threading.Lock()
        self._running.acquire()

    def run(self) -> None:
        assert self._function is not None
        try:
            self._results.append(self._function())
        except BaseException as error:
            self._error = error
        finally:
            self._function = None
            self._running.release()

    def wait(self) -> T:
        """Blocks until the function is through, then gives its result or raises what it raised."""
        with self._running:
            if self._error is not None:
                raise self._error
            return self._results[0]


class ThreadLane(ClosesOnSuccess):
    """One worker thread, first in first out; a daemon, so that an error on the way out need not join it."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[_Job[Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def submit(self, function: Callable[[], T]) -> Work[T]:
        """Queues `function` for the thread."""
        job = _Job(function)
        self._jobs.put(job)
        return job

    def close(self) -> None:
        """Joins the thread when the queue is empty."""
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        torch.set_grad_enabled(False)
        while (job := self._jobs.get()) is not None:
            job.run()
            del job  # else the last result would live until the next job comes


class _StreamWork(Generic[T]):
    """What a worker thread enqueues on a stream, with the event behind it."""

    def __init__(self, job: Work[tuple[T, torch.cuda.Event]]) -> None:
        self._job = job

    def wait(self) -> T:
        """Blocks the host until everything is enqueued, and the current stream until it is through."""
        result, done = self._job.wait()
        stream = torch.cuda.current_stream()
        stream.wait_event(done)
        for tensor in _tensors_of(result):
            if tensor.is_cuda:
                tensor.record_stream(stream)
        return result


class StreamLane(ClosesOnSuccess):
    """A CUDA stream and a thread that enqueues on it, each function behind what the submitter's stream held by then.

    The thread is for functions that wait for the device, as an exchange must before it knows how much comes: the
    submitter goes on meanwhile and enqueues the computation that hides the exchange.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._thread = ThreadLane("comm")
        self._held: deque[tuple[torch.cuda.Event, Callable[[], object]]] = deque()

    def submit(self, function: Callable[[], T]) -> Work[T]:
        """Queues `function` for the thread; host errors come from `wait`."""
        ready = torch.cuda.current_stream().record_event()

        def run() -> tuple[T, torch.cuda.Event]:
            while self._held and self._held[0][0].query():
                self._held.popleft()
            self._stream.wait_event(ready)
            with torch.cuda.stream(self._stream):
                result = function()
                done = self._stream.record_event()
            # The function's tensors come from other streams, whose allocator knows nothing of their use here.
            self._held.append((done, function))
            return result, done

        return _StreamWork(self._thread.submit(run))

    def close(self) -> None:
        """Waits, on the host, for the thread and for the stream."""
        self._thread.close()
        self._stream.synchronize()
        self._held.clear()


def _tensors_of(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors_of(item)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors_of(getattr(value, field.name))
