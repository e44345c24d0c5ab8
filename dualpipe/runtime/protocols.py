"""What the interpreter asks of a stage and of the links between stages. It knows nothing else of either."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Protocol

from dualpipe.transfers import Message

if TYPE_CHECKING:  # programs are compiled before torch is imported, to predict their memory
    from torch import Tensor

Lane = Literal["compute", "comm"]


class Run(Protocol):
    """One micro-batch on its way through one stage.

    Phases run forward in order and backward in reverse order. A phase on the comm lane is only started
    by `forward` and `backward`; `wait` completes it, and comes before the run's next phase.
    """

    def set_input(self, hidden_BTD: "Tensor", /) -> None:
        """Takes the activation from the stage before, which may be on this rank; nobody else uses the tensor."""
        ...

    def output(self) -> "Tensor":
        """Returns the activation for the stage after; handed over, not kept."""
        ...

    def set_output_gradient(self, gradient_BTD: "Tensor", /) -> None:
        """Takes the gradient from the stage after, which may be on this rank; nobody else uses the tensor."""
        ...

    def input_gradient(self) -> "Tensor":
        """Returns the gradient for the stage before; handed over, not kept."""
        ...

    def forward(self, phase: int) -> None:
        """Runs or starts a phase."""
        ...

    def backward(self, phase: int) -> None:
        """Runs or starts the backward for inputs of a phase."""
        ...

    def weight(self, phase: int) -> None:
        """Runs the backward for weights of a computation."""
        ...

    def wait(self) -> None:
        """Completes the phase under way on the comm lane."""
        ...


class PipelineStage(Protocol):
    """A stage, able to take micro-batches."""

    @property
    def lanes(self) -> Sequence[Lane]:
        """The lane of each phase, in forward order."""
        ...

    def start(self, direction: int, micro_batch: int) -> Run:
        """Begins a micro-batch. Activations between stages have the shape that `Transport` was told."""
        ...


class PendingReceive(Protocol):
    """A message on its way here."""

    def wait(self) -> "Tensor":
        """Returns the tensor, once it has arrived."""
        ...


class Transport(Protocol):
    """Links between pipeline ranks; each (source, destination, kind) keeps its order."""

    def post_receive(self, message: Message, /) -> PendingReceive:
        """Makes room for a message, in the order in which its link's messages will be sent."""
        ...

    def send(self, message: Message, tensor: "Tensor", /) -> None:
        """Sends without waiting for the other side."""
        ...

    def flush(self) -> None:
        """Waits until everything sent has left."""
        ...
