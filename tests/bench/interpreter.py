"""Measures the cost of the interpreter with idle stages and idle links."""

import statistics
import time

import torch
from torch import Tensor

from dualpipe.ir import Schedule
from dualpipe.runtime import pairing
from dualpipe.runtime.compile import compile_rank
from dualpipe.runtime.execute import execute
from dualpipe.runtime.protocols import Lane
from dualpipe.transfers import Message


class IdleRun:
    """Run that does nothing."""

    def __init__(self, hidden: Tensor) -> None:
        self._hidden = hidden

    def set_input(self, hidden: Tensor, /) -> None:
        """Drops the tensor."""

    def output(self) -> Tensor:
        """Returns the same tensor every time."""
        return self._hidden

    def set_output_gradient(self, gradient: Tensor, /) -> None:
        """Drops the tensor."""

    def input_gradient(self) -> Tensor:
        """Returns the same tensor every time."""
        return self._hidden

    def forward(self, phase: int) -> None:
        """Does nothing."""

    def backward(self, phase: int) -> None:
        """Does nothing."""

    def weight(self, phase: int) -> None:
        """Does nothing."""

    def wait(self) -> None:
        """Does nothing: nothing is pending."""


class IdleStage:
    """Pipeline stage of one idle computation."""

    lanes: tuple[Lane, ...] = ("compute",)

    def __init__(self, hidden: Tensor) -> None:
        self._hidden = hidden

    def start(self, direction: int, micro_batch: int) -> IdleRun:
        """Starts a micro-batch."""
        return IdleRun(self._hidden)


class IdleLinks:
    """Transport and pending receive that return the same tensor for every message."""

    def __init__(self, hidden: Tensor) -> None:
        self._hidden = hidden

    def post_receive(self, message: Message, /) -> "IdleLinks":
        """Returns itself as the pending receive."""
        return self

    def wait(self) -> Tensor:
        """Returns the tensor."""
        return self._hidden

    def send(self, message: Message, tensor: Tensor, /) -> None:
        """Does nothing."""

    def flush(self) -> None:
        """Does nothing: nothing is pending."""


def microseconds_per_operation(schedule: Schedule, rank: int, num_repeats: int) -> float:
    """Returns the median time of a rank's program over repeats, divided by its operations."""
    hidden = torch.zeros(1)
    stages = {stage: IdleStage(hidden) for _, stage in schedule.stages_of(rank)}
    lanes = {number: stage.lanes for number, stage in stages.items()}
    program = compile_rank(schedule, rank, lanes, pairing.overlapped)
    links = IdleLinks(hidden)
    num_operations = sum(map(len, schedule.ranks[rank]))
    seconds = []
    for _ in range(num_repeats):
        begun = time.perf_counter()
        execute(program, stages, links)
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds) / num_operations * 1e6
