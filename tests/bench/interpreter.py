"""What the interpreter itself costs: programs of stages that do nothing over links that do nothing."""

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
    """`dualpipe.runtime.protocols.Run` that does nothing."""

    def __init__(self, hidden: Tensor) -> None:
        self._hidden = hidden

    def set_input(self, hidden: Tensor, /) -> None:
        """Drops it."""

    def output(self) -> Tensor:
        """Always the same."""
        return self._hidden

    def set_output_gradient(self, gradient: Tensor, /) -> None:
        """Drops it."""

    def input_gradient(self) -> Tensor:
        """Always the same."""
        return self._hidden

    def forward(self, phase: int) -> None:
        """F of nothing."""

    def backward(self, phase: int) -> None:
        """I of nothing."""

    def weight(self, phase: int) -> None:
        """W of nothing."""

    def wait(self) -> None:
        """Nothing is under way."""


class IdleStage:
    """`dualpipe.runtime.protocols.PipelineStage` of one computation, which does nothing."""

    lanes: tuple[Lane, ...] = ("compute",)

    def __init__(self, hidden: Tensor) -> None:
        self._hidden = hidden

    def start(self, direction: int, micro_batch: int) -> IdleRun:
        """Begins a micro-batch."""
        return IdleRun(self._hidden)


class IdleLinks:
    """`dualpipe.runtime.protocols.Transport`, and its receipts, that give the same tensor for every message."""

    def __init__(self, hidden: Tensor) -> None:
        self._hidden = hidden

    def post_receive(self, message: Message, /) -> "IdleLinks":
        """Itself."""
        return self

    def wait(self) -> Tensor:
        """The tensor."""
        return self._hidden

    def send(self, message: Message, tensor: Tensor, /) -> None:
        """Sends nothing."""

    def flush(self) -> None:
        """Nothing is under way."""


def microseconds_per_operation(schedule: Schedule, rank: int, num_repeats: int) -> float:
    """The median over repeats of a rank's whole program, over the operations of its schedule."""
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
