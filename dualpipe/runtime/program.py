"""A schedule lowered to one rank's steps over phases, on two lanes, with explicit waits."""

from dataclasses import dataclass
from enum import Enum

from dualpipe.transfers import Message


class Action(Enum):
    """What a step does."""

    RECEIVE = "receive"  # post the receipt of a message
    ACCEPT = "accept"  # wait for it and hand it to the run; one from this very rank is at hand already
    FORWARD = "forward"  # run a computation, or start an exchange
    BACKWARD = "backward"  # the same for gradients of inputs
    WEIGHT = "weight"  # gradients of weights
    WAIT = "wait"  # complete the run's exchange under way
    SEND = "send"  # hand a message to its link, or keep it for another of the rank's stages to accept
    FINISH = "finish"  # the run is over, nothing of it is kept


@dataclass(frozen=True, slots=True)
class RunKey:
    """One micro-batch in one stage."""

    direction: int
    stage: int
    micro_batch: int


@dataclass(frozen=True, slots=True)
class Step:
    """One instruction. `phase` counts within the stage, -1 where there is none; `message` for transfers."""

    action: Action
    run: RunKey
    phase: int = -1
    message: Message | None = None


@dataclass(frozen=True, slots=True)
class Program:
    """Everything that one rank does in one optimizer step's passes, in order."""

    rank: int
    steps: tuple[Step, ...]
