"""A plain interpreter of programs. It knows steps, runs and links, and neither the schedule nor the model."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import assert_never

from torch import Tensor

from dualpipe.program import Action, Program, RunKey, Step
from dualpipe.protocols import Receipt, Run, Stage, Transport
from dualpipe.transfers import Message


@dataclass(frozen=True, slots=True)
class Execution:
    """What running a program showed.

    spans: start and end of every step, seconds from the program's start. peak_runs: micro-batches of
    which something was kept at once.
    """

    spans: tuple[tuple[float, float], ...]
    peak_runs: int


class _Kept:
    """A message between two stages of one rank: the tensor itself."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def wait(self) -> Tensor:
        """The tensor."""
        return self._tensor


def execute(program: Program, stages: Mapping[int, Stage], transport: Transport) -> Execution:
    """Runs every step in order.

    Args:
        program: made for this rank.
        stages: by number, those that the rank holds.
        transport: the links to the other pipeline ranks.
    """
    runs: dict[RunKey, Run] = {}
    receipts: dict[Message, Receipt] = {}  # by message on its way, those to this very rank too
    spans: list[tuple[float, float]] = []
    peak = 0
    origin = time.perf_counter()
    for step in program.steps:
        started = time.perf_counter()
        if step.run not in runs and step.action is not Action.RECEIVE:
            runs[step.run] = stages[step.run.stage].start(step.run.direction, step.run.micro_batch)
            peak = max(peak, len(runs))
        _perform(step, runs, receipts, transport)
        spans.append((started - origin, time.perf_counter() - origin))
    transport.flush()
    assert not runs, f"kept after the program: {sorted(runs, key=str)}"
    assert not receipts, f"never accepted: {', '.join(map(str, receipts))}"
    return Execution(tuple(spans), peak)


def _perform(step: Step, runs: dict[RunKey, Run], receipts: dict[Message, Receipt], transport: Transport) -> None:
    match step.action:
        case Action.RECEIVE:
            message = _message(step)
            receipts[message] = transport.post_receive(message)
        case Action.ACCEPT:
            message = _message(step)
            tensor = receipts.pop(message).wait()
            if message.kind == "activation":
                runs[step.run].set_input(tensor)
            else:
                runs[step.run].set_output_gradient(tensor)
        case Action.SEND:
            message, run = _message(step), runs[step.run]
            tensor = run.output() if message.kind == "activation" else run.input_gradient()
            if message.source == message.destination:
                receipts[message] = _Kept(tensor)
            else:
                transport.send(message, tensor)
        case Action.FORWARD:
            runs[step.run].forward(step.phase)
        case Action.BACKWARD:
            runs[step.run].backward(step.phase)
        case Action.WEIGHT:
            runs[step.run].weight(step.phase)
        case Action.WAIT:
            runs[step.run].wait()
        case Action.FINISH:
            del runs[step.run]
        case _ as other:
            assert_never(other)


def _message(step: Step) -> Message:
    assert step.message is not None
    return step.message
