"""Copies tensors between the device and host memory, next to computation."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Generic

import torch
from torch import Tensor

from comm.lane import ClosesOnSuccess, T, ThreadLane
from comm.protocol import Work


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
