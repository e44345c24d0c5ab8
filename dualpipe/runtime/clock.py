"""Times the steps of a program with cheap marks, which are read when the program has ended."""

import time
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import torch

MarkT = TypeVar("MarkT")


class Clock(Protocol[MarkT]):
    """Source of time marks on the compute lane."""

    def mark(self) -> MarkT:
        """Records a mark without waiting."""

    def seconds(self, marks: Sequence[MarkT]) -> list[float]:
        """Waits for the last mark and returns the seconds from the first mark to each mark."""


class HostClock:
    """Host time: the time of the work on CPU, but only of its launch on a GPU."""

    def mark(self) -> float:
        """Returns seconds on a clock of this process."""
        return time.perf_counter()

    def seconds(self, marks: Sequence[float]) -> list[float]:
        """Returns the seconds from the first mark to each mark."""
        return [mark - marks[0] for mark in marks]


class CudaClock:
    """Device time: events on the current stream, with a resolution of about a microsecond."""

    def mark(self) -> torch.cuda.Event:
        """Returns an event after all work launched so far."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, marks: Sequence[torch.cuda.Event]) -> list[float]:
        """Waits for the last event and returns the seconds from the first event to each event."""
        marks[-1].synchronize()  # host sync
        return [marks[0].elapsed_time(mark) / 1000 for mark in marks]


def open_clock(device: torch.device) -> Clock[Any]:
    """Opens a clock with events on CUDA and host time on other devices."""
    return CudaClock() if device.type == "cuda" else HostClock()
