"""What the model may know of the exchange: the Dispatcher and what it gives.

Shape legend: T tokens of this rank, K experts per token, A arrived rows, D hidden size, E local experts.
"""

from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from torch import Tensor

T_co = TypeVar("T_co", covariant=True)


class Work(Protocol, Generic[T_co]):
    """Something under way on the comm lane."""

    def wait(self) -> T_co:
        """The result, once it may be used on the compute lane. Raises what the work raised."""
        ...


class Handle(Protocol):
    """One routing of one micro-batch: who sends what to whom. Made by `Dispatcher.plan`, reusable both ways."""

    @property
    def num_tokens(self) -> int:
        """Tokens of this rank, T."""
        ...


@dataclass(frozen=True, slots=True)
class Arrived:
    """Rows at their experts' rank, sorted by local expert.

    rows_AD, weights_A (float, the routing weight of each row), counts: rows of each local expert, on the host.
    """

    rows_AD: Tensor
    weights_A: Tensor
    counts: tuple[int, ...]


class Dispatcher(Protocol):
    """Moves token rows to the experts' ranks and back; both ways explicit, never hidden in autograd.

    The backward of `dispatch` is a combine with the same handle, the weights' gradients riding back; the
    backward of `combine` is a dispatch of the gradient. Every rank of the expert group makes the
    same calls in the same order.
    """

    num_local_experts: int

    def plan(self, topk_ids_TK: Tensor) -> Handle:
        """Starts the exchange of counts. ids: int64, global expert ids, distinct within a row."""
        ...

    def dispatch(self, rows_TD: Tensor, weights_TK: Tensor, handle: Handle) -> Work[Arrived]:
        """A copy of each token's row, and the weight, to each of its experts."""
        ...

    def combine(self, rows_AD: Tensor, handle: Handle) -> Work[Tensor]:
        """The unweighted sum over each token's experts, rows_TD."""
        ...

    def dispatch_backward(self, rows_AD: Tensor, weights_A: Tensor, handle: Handle) -> Work[tuple[Tensor, Tensor]]:
        """Gradients of `dispatch`'s inputs from those of its outputs: rows summed per token (TD), weights (TK)."""
        ...

    def combine_backward(self, rows_TD: Tensor, handle: Handle) -> Work[Tensor]:
        """The gradient of `combine`'s input from that of its output: a copy to each expert's row (AD)."""
        ...
