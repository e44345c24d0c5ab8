"""Defines the protocols of stages and links that the interpreter uses."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NoReturn, Protocol

from dualpipe.ir import Message

if TYPE_CHECKING:  # programs are compiled before torch is imported, to predict their memory
    from torch import Tensor

Lane = Literal["compute", "comm"]


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
    """Base of runs of forward-only programs without exchange, which call none of its methods."""

    def _refuse(self, *arguments: object) -> NoReturn:
        raise AssertionError("a forward-only run has no exchange and no backward, and keeps nothing for it")

    wait = set_output_gradient = input_gradient = backward = weight = _refuse
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
