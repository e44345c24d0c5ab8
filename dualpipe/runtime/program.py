"""Defines programs: one rank's steps over phases, on two lanes, with explicit waits."""

from dataclasses import dataclass
from enum import Enum

from dualpipe.transfers import Message


class Action(Enum):
    """Action of a step."""

    RECEIVE = "receive"  # post the receive of a message
    ACCEPT = "accept"  # wait for a message and pass it to the run; a message of this rank is available at once
    FORWARD = "forward"  # run the forward of a computation, or start its exchange
    BACKWARD = "backward"  # the same for the backward for inputs
    WEIGHT = "weight"  # run the backward for weights
    WAIT = "wait"  # complete the run's pending exchange
    SEND = "send"  # send a message, or keep it for another stage of this rank
    OFFLOAD = "offload"  # start the copy of the run's activation to host memory
    RELEASE = "release"  # wait for that copy, and free the activation on the device
    RELOAD = "reload"  # allocate the activation again, and start the copy back
    RESTORE = "restore"  # wait for the copy back
    FINISH = "finish"  # free the run
    REDUCE = "reduce"  # start to reduce the gradients of the run's stage, which are complete


@dataclass(frozen=True, slots=True)
class RunKey:
    """Key of a run: one micro-batch in one stage."""

    direction: int
    stage: int
    micro_batch: int


@dataclass(frozen=True, slots=True)
class Step:
    """Instruction of a program. `phase` counts within the stage, -1 if there is none."""

    action: Action
    run: RunKey
    phase: int = -1
    message: Message | None = None


@dataclass(frozen=True, slots=True)
class Program:
    """All steps of one rank in the forward and backward passes of one optimizer step, in order."""

    rank: int
    steps: tuple[Step, ...]
