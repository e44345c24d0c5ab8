"""Defines programs, one rank's steps over phases on two lanes, and protocols of what they call.

Waits and reductions are explicit. The ranks that hold a stage reduce its gradients together, so they must start
reductions in the same order. It is a function of the schedule, never of time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Literal, NoReturn, Protocol

from dualpipe.ir import Message, Op, Schedule

if TYPE_CHECKING:  # programs are compiled before torch is imported, to predict their memory
    from torch import Tensor


Lane = Literal["compute", "comm"]

PHASE_KERNELS = 150  # most kernels that a phase of a layer starts, counted
MOST_AHEAD = 6
"""Phases that the host may have started and the compute lane not ended.

CUDA queues about 1,000 kernels. Behind a receive that waits for its peer, a full queue would block the host before it
starts what that peer waits for (nccl#1766).
"""


class Run(Protocol):
    """Forward and backward of one micro-batch through one stage, in order of the phases and in reverse.

    For a phase on the comm lane, `forward` and `backward` only start it. `wait` completes it and must be called before
    the run's next phase.
    """

    def set_input(self, hidden_BTD: "Tensor", /) -> None:
        """Takes the activation of the previous stage, which may be on this rank. The tensor is not shared.

        The first stage of a network that decodes takes the tokens that the last stage chose.
        """

    def output(self) -> "Tensor":
        """Returns the activation for the next stage, or chosen tokens of the last, and drops its reference."""

    def set_output_gradient(self, gradient_BTD: "Tensor", /) -> None:
        """Takes the gradient of the next stage, which may be on this rank. The tensor is not shared."""

    def input_gradient(self) -> "Tensor":
        """Returns the gradient for the previous stage and drops its reference."""

    def forward(self, phase: int) -> None:
        """Runs the forward of a phase, or starts it on the comm lane."""

    def backward(self, phase: int) -> None:
        """Runs the backward for inputs of a phase, or starts it on the comm lane."""

    def weight(self, phase: int) -> None:
        """Runs the backward for weights of a computation."""

    def wait(self) -> None:
        """Completes the pending phase on the comm lane."""

    def offload(self) -> None:
        """Starts to copy what the forward keeps for the backward to host memory."""

    def release(self) -> None:
        """Completes the copy to host memory, and frees what was copied."""

    def reload(self) -> None:
        """Allocates again what `release` freed, and starts to copy it back."""

    def restore(self) -> None:
        """Completes the copy back; must be called before the backward."""


class ForwardOnlyRun:
    """Base of runs of forward-only programs, which call none of its methods but `wait` after exchanges."""

    def _refuse(self, *arguments: object) -> NoReturn:
        raise AssertionError("a forward-only run has no exchange and no backward, and keeps nothing for it")

    def wait(self) -> None:
        """Is called by no program without exchange."""
        self._refuse()

    set_output_gradient = input_gradient = backward = weight = _refuse
    offload = release = reload = restore = _refuse


class PipelineStage(Protocol):
    """Stage that runs micro-batches."""

    @property
    def lanes(self) -> Sequence[Lane]:
        """Lane of each phase, in forward order."""

    def start(self, direction: int, micro_batch: int) -> Run:
        """Starts the run of a micro-batch. Activations have the shape that the transport expects."""


class PendingReceive(Protocol):
    """Receive that is posted but not complete."""

    def wait(self) -> "Tensor":
        """Waits for the message and returns its tensor."""


class Transport(Protocol):
    """Links between pipeline ranks. Each (source, destination, kind) is a FIFO link."""

    def post_receive(self, message: Message, /) -> PendingReceive:
        """Posts the receive of a message, in the order in which the link's messages are sent."""

    def send(self, message: Message, tensor: "Tensor", /) -> None:
        """Sends a tensor without waiting for the receiver."""

    def flush(self) -> None:
        """Waits until all messages have been sent."""


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
    return _sorted_stages(
        schedule, lambda stage: -min(n for (_, key_stage), n in num_after.items() if key_stage == stage)
    )


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
