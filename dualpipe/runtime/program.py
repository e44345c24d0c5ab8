"""Defines programs: one rank's steps over phases, on two lanes, with explicit waits and reductions.

The ranks that hold a stage reduce its gradients together, so they must start reductions in the same order. It is a
function of the schedule, never of time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from dualpipe.ir import Message, Op, Schedule


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


def with_reductions(program: Program) -> Program:
    """Adds one REDUCE step for each stage to a training program, after the stage's last run."""
    last = {step.run.stage: index for index, step in enumerate(program.steps) if step.action is Action.FINISH}
    steps: list[Step] = []
    for index, step in enumerate(program.steps):
        steps.append(step)
        if last.get(step.run.stage) == index:
            steps.append(Step(Action.REDUCE, step.run))
    return Program(program.rank, tuple(steps))


def reduction_order(schedule: Schedule) -> tuple[int, ...]:
    """Returns all stages by the end of their last backward, counted in groups from the end of a rank."""
    kinds = (Op.BACKWARD, Op.BACKWARD_WEIGHT)
    num_after = {
        (rank, op.stage): len(groups) - index
        for rank, groups in enumerate(schedule.ranks)
        for index, group in enumerate(groups)
        for op in group
        if op.kind in kinds
    }
    return _sorted_stages(schedule, lambda stage: -min(n for (_, held), n in num_after.items() if held == stage))


def first_use_order(schedule: Schedule) -> tuple[int, ...]:
    """Returns all stages, ordered by their first forward on the rank that runs it first."""
    first: dict[int, int] = {}
    for groups in schedule.ranks:
        for index, group in enumerate(groups):
            for op in group:
                if op.kind is Op.FORWARD:
                    first[op.stage] = min(index, first.get(op.stage, index))
    return _sorted_stages(schedule, first.__getitem__)


def _sorted_stages(schedule: Schedule, key: Callable[[int], int]) -> tuple[int, ...]:
    return tuple(sorted(range(schedule.num_stages), key=lambda stage: (key(stage), stage)))
