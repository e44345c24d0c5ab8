"""What steps are timed by: marks that cost next to nothing while a program runs, read when it is over."""

import time
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import torch

MarkT = TypeVar("MarkT")


class Clock(Protocol[MarkT]):
    """Marks moments of the compute lane."""

    def mark(self) -> MarkT:
        """Notes the moment; waits for nothing."""
        ...

    def seconds(self, marks: Sequence[MarkT]) -> list[float]:
        """Returns the seconds of each mark from the first one on; waits until the last one has passed."""
        ...


class HostClock:
    """The host's time: of the work itself where the host does it, of its launch on a GPU."""

    def mark(self) -> float:
        """Seconds on a clock of this process."""
        return time.perf_counter()

    def seconds(self, marks: Sequence[float]) -> list[float]:
        """Differences from the first."""
        return [mark - marks[0] for mark in marks]


class CudaClock:
    """The device's time: events on the stream that is current where they are marked, to about a microsecond."""

    def mark(self) -> torch.cuda.Event:
        """Returns an event behind all work launched so far."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, marks: Sequence[torch.cuda.Event]) -> list[float]:
        """Differences from the first; the host waits for the last."""
        marks[-1].synchronize()
        return [marks[0].elapsed_time(mark) / 1000 for mark in marks]


def open_clock(device: torch.device) -> Clock[Any]:
    """Events on CUDA, the host's time elsewhere."""
    return CudaClock() if device.type == "cuda" else HostClock()
