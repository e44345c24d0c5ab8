"""Runs exchanges and copies next to computation: on worker threads, on CUDA streams, or inline."""

import queue
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

from comm.protocol import Work

T = TypeVar("T")


class ClosesOnSuccess(ABC):
    """Context manager that closes only if the body raised no error.

    After an error no thread is joined: it may be inside a collective whose peers wait for this rank, which must exit.
    """

    @abstractmethod
    def close(self) -> None:
        """Waits for pending work and ends the threads."""

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
        """Starts `function` after everything submitted earlier. Keeps its captured tensors alive until then."""
        ...

    def close(self) -> None:
        """Waits for all submitted functions. Nothing may be submitted afterwards."""
        ...


class _Job(Generic[T]):
    """Function that runs on a worker thread. Its lock is held until it has returned or raised."""

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
        """Blocks until the function has ended, then returns its result or raises its error."""
        with self._running:
            if self._error is not None:
                raise self._error
            return self._results[0]


class ThreadLane(ClosesOnSuccess):
    """One daemon thread that runs functions in order; a process can exit without joining it."""

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
        """Runs what is queued, then joins the thread."""
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        torch.set_grad_enabled(False)
        while (job := self._jobs.get()) is not None:
            job.run()
            del job  # else the last result would be kept until the next job


class _HeldFunction:
    """Function that holds what its kernels may still read, until `done`."""

    def __init__(self, function: Callable[[], object], done: torch.cuda.Event) -> None:
        self.function: Callable[[], object] | None = function
        self.done = done


class _StreamWork(Generic[T]):
    def __init__(self, job: Work[tuple[T, _HeldFunction]], submitter: torch.cuda.Stream) -> None:
        self._job = job
        self._submitter = submitter

    def wait(self) -> T:
        """Blocks the host until all kernels are enqueued, and the current stream until they have run."""
        result, held = self._job.wait()
        stream = torch.cuda.current_stream()
        stream.wait_event(held.done)
        if stream == self._submitter:
            held.function = None  # memory of this stream that it captured is only used again after the event
        for tensor in _tensors_of(result):
            if tensor.is_cuda:
                tensor.record_stream(stream)
        return result


class StreamLane(ClosesOnSuccess):
    """CUDA stream and a thread that enqueues on it, each function after the work queued at its submission.

    What a function captured is kept until its kernels have run, or until the stream that submitted it waits for them.

    Functions may wait for the device, as an exchange must read the number of incoming rows; meanwhile the submitter
    enqueues the computation that hides the exchange.
    """

    def __init__(self, device: torch.device, name: str = "comm") -> None:
        self._stream = torch.cuda.Stream(device)
        self._thread = ThreadLane(name)
        self._held: deque[_HeldFunction] = deque()

    def submit(self, function: Callable[[], T]) -> Work[T]:
        """Queues `function` for the thread. `wait` raises its host errors."""
        submitter = torch.cuda.current_stream()
        ready = submitter.record_event()

        def run() -> tuple[T, _HeldFunction]:
            while self._held and self._held[0].done.query():
                self._held.popleft()
            self._stream.wait_event(ready)
            with torch.cuda.stream(self._stream):
                result = function()
                done = self._stream.record_event()
            # The function's tensors belong to other streams, whose allocator does not know that this stream uses them.
            held = _HeldFunction(function, done)
            self._held.append(held)
            return result, held

        return _StreamWork(self._thread.submit(run), submitter)

    def close(self) -> None:
        """Waits on the host for the thread and for the stream."""
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


class HostCopies(ClosesOnSuccess):
    """Link between a device and its host memory. Directions run at the same time, each in order."""

    @abstractmethod
    def to_host(self, tensors: Sequence[Tensor]) -> Work[Sequence[Tensor]]:
        """Starts to copy tensors, which must not change, to host memory, after the compute lane's work."""

    @abstractmethod
    def to_device(self, hosts: Sequence[Tensor], tensors: Sequence[Tensor]) -> Work[None]:
        """Starts to copy host tensors into tensors of the same shape, after the compute lane's work."""


class ThreadHostCopies(HostCopies):
    """Copies of a CPU: one worker thread for each direction, started by the first copy."""

    def __init__(self) -> None:
        self._lanes: dict[str, ThreadLane] = {}

    def to_host(self, tensors: Sequence[Tensor]) -> Work[Sequence[Tensor]]:
        """Copies the tensors on the thread."""
        return self._lane("to-host").submit(lambda: [tensor.clone() for tensor in tensors])

    def to_device(self, hosts: Sequence[Tensor], tensors: Sequence[Tensor]) -> Work[None]:
        """Copies the numbers on the thread."""
        return self._lane("from-host").submit(lambda: _copy_all(hosts, tensors))

    def close(self) -> None:
        """Waits for pending copies and ends the threads."""
        for lane in self._lanes.values():
            lane.close()

    def _lane(self, name: str) -> ThreadLane:
        if name not in self._lanes:
            self._lanes[name] = ThreadLane(name)
        return self._lanes[name]


class StreamHostCopies(HostCopies):
    """Copies of a CUDA device through pinned memory, on two streams, for which the current stream waits."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams: dict[str, torch.cuda.Stream] = {}

    def to_host(self, tensors: Sequence[Tensor]) -> Work[Sequence[Tensor]]:
        """Copies the tensors on the stream into pinned memory, which torch's host allocator reuses."""
        hosts = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
        return _EventWork(self._copy("to-host", tensors, hosts), hosts)

    def to_device(self, hosts: Sequence[Tensor], tensors: Sequence[Tensor]) -> Work[None]:
        """Copies the numbers on the stream."""
        return _EventWork(self._copy("from-host", hosts, tensors), None)

    def close(self) -> None:
        """Waits on the host for the copies."""
        for stream in self._streams.values():
            stream.synchronize()

    def _copy(self, name: str, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> torch.cuda.Event:
        if name not in self._streams:
            self._streams[name] = torch.cuda.Stream(self._device)
        stream = self._streams[name]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            _copy_all(sources, targets)
        done: torch.cuda.Event = stream.record_event()
        return done


class _EventWork(Generic[T]):
    def __init__(self, done: torch.cuda.Event, result: T) -> None:
        self._done = done
        self._result = result

    def wait(self) -> T:
        """Blocks the current stream, not the host, until the copies have ended."""
        torch.cuda.current_stream().wait_event(self._done)
        return self._result


def _copy_all(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source, non_blocking=True)


def open_host_copies(device: torch.device) -> HostCopies:
    """Opens the link between a device and its host memory. Threads and streams start with the first copy."""
    return StreamHostCopies(device) if device.type == "cuda" else ThreadHostCopies()
