"""Measures the cost of the interpreter with idle stages and idle links."""

import statistics
import time

import torch
from torch import Tensor

from bench.contenders import PassingStage
from dualpipe.ir import Message, Schedule
from dualpipe.runtime import pairing
from dualpipe.runtime.compile import compile_rank
from dualpipe.runtime.execute import execute


class IdleLinks:
    """Transport and pending receive that return the same tensor for every message."""

    def __init__(self, hidden: Tensor) -> None:
        self._hidden = hidden

    def post_receive(self, message: Message, /) -> "IdleLinks":
        return self

    def wait(self) -> Tensor:
        return self._hidden

    def send(self, message: Message, tensor: Tensor, /) -> None:
        """Does nothing."""

    def flush(self) -> None:
        """Does nothing: nothing is pending."""


def microseconds_per_operation(schedule: Schedule, rank: int, num_repeats: int) -> float:
    """Returns the median time of a rank's program over repeats, divided by its operations."""
    hidden = torch.zeros(1)
    stages = {stage: PassingStage(hidden, lambda kind, phase: None) for _, stage in schedule.stages_of(rank)}
    lanes = {number: stage.lanes for number, stage in stages.items()}
    program = compile_rank(schedule, rank, lanes, pairing.overlapped)
    links = IdleLinks(hidden)
    num_operations = sum(map(len, schedule.ranks[rank]))
    seconds = []
    for _ in range(num_repeats):
        begun = time.perf_counter()
        execute(program, stages, links)  # type: ignore[arg-type]
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds) / num_operations * 1e6
