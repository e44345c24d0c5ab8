"""Executes programs with a plain interpreter, which knows neither the schedule nor the model.

Cheap marks time the steps. They are read when the program has ended.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Protocol, TypeVar, assert_never

import torch
from torch import Tensor

from dualpipe.ir import Message
from dualpipe.runtime.program import (
    MOST_AHEAD,
    Action,
    PendingReceive,
    PipelineStage,
    Program,
    Run,
    RunKey,
    Step,
    Transport,
)

MarkT = TypeVar("MarkT")


class Clock(Protocol[MarkT]):
    """Source of time marks on the compute lane."""

    def mark(self) -> MarkT:
        """Records a mark without waiting."""

    def wait(self, mark: MarkT) -> None:
        """Blocks the host until the lane has passed a mark."""

    def drain(self) -> None:
        """Blocks the host until the lane has ended all its work."""

    def seconds(self, marks: Sequence[MarkT]) -> list[float]:
        """Waits for the last mark and returns the seconds from the first mark to each mark."""


class HostClock:
    """Host time: the time of the work on CPU, but only of its launch on a GPU."""

    def mark(self) -> float:
        """Returns seconds on a clock of this process."""
        return time.perf_counter()

    def wait(self, mark: float) -> None:
        """Returns at once: what the host has marked has run."""

    def drain(self) -> None:
        """Returns at once."""

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

    def wait(self, mark: torch.cuda.Event) -> None:
        """Waits for an event."""
        mark.synchronize()  # host sync

    def drain(self) -> None:
        """Waits for the current stream."""
        torch.cuda.current_stream().synchronize()  # host sync

    def seconds(self, marks: Sequence[torch.cuda.Event]) -> list[float]:
        """Waits for the last event and returns the seconds from the first event to each event."""
        self.wait(marks[-1])
        return [marks[0].elapsed_time(mark) / 1000 for mark in marks]


def open_clock(device: torch.device) -> Clock[Any]:
    """Opens a clock with events on CUDA and host time on other devices."""
    return CudaClock() if device.type == "cuda" else HostClock()


_PHASES = (Action.FORWARD, Action.BACKWARD, Action.WEIGHT)

_OFFLOADED = {Action.RELEASE: 1, Action.RELOAD: -1}
"""Change of the number of offloaded runs in a step."""


@dataclass(frozen=True, slots=True)
class Execution:
    """Measurements of one run of a program.

    Attributes:
        peak_runs: maximum number of micro-batches with live activations on the device.
        origin_seconds: start of the program on the wall clock (`time.time`), which ranks on one host share.
    """

    peak_runs: int
    origin_seconds: float
    _boundaries: Callable[[], list[float]]

    @property
    def spans(self) -> tuple[tuple[float, float], ...]:
        """Start and end of every step, in seconds from the program's start; waits for a device clock."""
        return tuple(pairwise(self._boundaries()))


class _LocalReceive:
    """Message between two stages of one rank: the tensor itself."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def wait(self) -> Tensor:
        return self._tensor


def execute(
    program: Program,
    stages: Mapping[int, PipelineStage],
    transport: Transport,
    clock: Clock[Any] | None = None,
    follow: Callable[[tuple[Step, ...]], Iterable[Step]] = iter,
    reduce: Callable[[int], None] = lambda stage: None,
) -> Execution:
    """Runs every step in order, at most `MOST_AHEAD` phases ahead of the compute lane.

    At the end the host waits for the lane, which waits for all exchanges and messages of the program.

    Args:
        stages: stages that the rank holds, by number.
        follow: wrapper that yields the program's steps, for example to show progress.
        reduce: starts to reduce the gradients of a stage, given its number. By default nothing is reduced.
    """
    clock = clock or HostClock()
    runs: dict[RunKey, Run] = {}
    receives: dict[Message, PendingReceive] = {}  # includes messages of this rank to itself
    peak = num_offloaded = 0
    origin = time.time()
    marks = [clock.mark()]
    ahead = deque[Any]()  # marks of phases that may still run
    for step in follow(program.steps):
        if step.run not in runs and step.action not in (Action.RECEIVE, Action.REDUCE):
            runs[step.run] = stages[step.run.stage].start(step.run.direction, step.run.micro_batch)
        num_offloaded += _OFFLOADED.get(step.action, 0)
        peak = max(peak, len(runs) - num_offloaded)
        _perform(step, runs, receives, transport, reduce)
        marks.append(clock.mark())
        if step.action in _PHASES:
            ahead.append(marks[-1])
        if len(ahead) > MOST_AHEAD:
            clock.wait(ahead.popleft())
    transport.flush()
    clock.drain()
    assert not runs, f"not finished by the program: {sorted(runs, key=str)}"
    assert not receives, f"never accepted: {', '.join(map(str, receives))}"
    return Execution(peak, origin, partial(clock.seconds, marks))


def _perform(
    step: Step,
    runs: dict[RunKey, Run],
    receives: dict[Message, PendingReceive],
    transport: Transport,
    reduce: Callable[[int], None],
) -> None:
    match step.action:
        case Action.RECEIVE:
            message = _message(step)
            receives[message] = transport.post_receive(message)
        case Action.ACCEPT:
            message = _message(step)
            tensor = receives.pop(message).wait()
            if message.kind == "gradient":
                runs[step.run].set_output_gradient(tensor)
            else:
                runs[step.run].set_input(tensor)
        case Action.SEND:
            _send(_message(step), runs[step.run], receives, transport)
        case Action.FINISH:
            del runs[step.run]
        case Action.REDUCE:
            reduce(step.run.stage)
        case _:
            _run(step, runs[step.run])


def _run(step: Step, run: Run) -> None:
    match step.action:
        case Action.FORWARD:
            run.forward(step.phase)
        case Action.BACKWARD:
            run.backward(step.phase)
        case Action.WEIGHT:
            run.weight(step.phase)
        case Action.WAIT:
            run.wait()
        case Action.OFFLOAD:
            run.offload()
        case Action.RELEASE:
            run.release()
        case Action.RELOAD:
            run.reload()
        case Action.RESTORE:
            run.restore()
        case Action.RECEIVE | Action.ACCEPT | Action.SEND | Action.FINISH | Action.REDUCE:
            raise AssertionError(f"{step} is not a step of a run")
        case _ as other:
            assert_never(other)


def _send(message: Message, run: Run, receives: dict[Message, PendingReceive], transport: Transport) -> None:
    tensor = run.input_gradient() if message.kind == "gradient" else run.output()
    if message.source == message.destination:
        receives[message] = _LocalReceive(tensor)
    else:
        transport.send(message, tensor)


def _message(step: Step) -> Message:
    assert step.message is not None
    return step.message
