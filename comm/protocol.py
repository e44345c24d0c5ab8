"""What the model may know of the exchange: the Dispatcher and what it gives.

Shape legend: T tokens of this rank, K experts per token, A arrived rows, D hidden size, E local experts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

T_co = TypeVar("T_co", covariant=True)
SourceT = TypeVar("SourceT")
ResultT = TypeVar("ResultT")


class Work(Protocol, Generic[T_co]):
    """Something under way on the comm lane."""

    def wait(self) -> T_co:
        """Returns the result, once it may be used on the compute lane. Raises what the work raised."""
        ...


class MappedWork(Generic[SourceT, ResultT]):
    """Other work's result after a function of it, which runs where it is waited for: on the compute lane."""

    def __init__(self, work: Work[SourceT], function: Callable[[SourceT], ResultT]) -> None:
        """Keeps `function`, which runs at every `wait`, without recording gradients."""
        self._work = work
        self._function = function

    def wait(self) -> ResultT:
        """Returns the function of the other work's result. Raises what either raised."""
        given = self._work.wait()
        with torch.no_grad():
            return self._function(given)


@dataclass(frozen=True, slots=True)
class Label:
    """Whose exchange it is, for logs and accounts; it decides nothing. `micro_batch` counts within its direction."""

    layer: int
    direction: int
    micro_batch: int

    def __str__(self) -> str:
        return f"layer {self.layer}, direction {self.direction}, micro-batch {self.micro_batch}"


class Handle(Protocol):
    """One routing of one micro-batch: who sends what to whom. ResultT by `Dispatcher.plan`, reusable both ways."""

    @property
    def num_tokens(self) -> int:
        """Tokens of this rank, T."""
        ...


class RowOrder(Protocol):
    """In which order copies of tokens go to experts, and the way back."""

    @property
    def tokens_A(self) -> Tensor:
        """The token of each place, int64."""
        ...

    def copy_rows(self, rows_TD: Tensor) -> Tensor:
        """Copies a row for each place, AD."""
        ...

    def copy_weights(self, weights_TK: Tensor) -> Tensor:
        """Returns the weight of each place, A."""
        ...

    def sum_rows(self, rows_AD: Tensor) -> Tensor:
        """Sums over each token's places, TD."""
        ...

    def restore_weights(self, weights_A: Tensor) -> Tensor:
        """Returns the value of each choice, TK."""
        ...


@runtime_checkable
class RankLocalDispatcher(Protocol):
    """A dispatcher whose rows never leave this rank and are not changed: the model may take and give them itself."""

    def local_order(self, handle: Handle) -> tuple[tuple[int, ...], RowOrder]:
        """Rows of each expert, on the host, and the order of all rows."""
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

    def plan(self, ids_TK: Tensor, weights_TK: Tensor | None = None, label: Label | None = None) -> Handle:
        """Starts the exchange of counts.

        Args:
            ids_TK: int64, global expert ids, distinct within a row; -1 stands for no expert: such a choice is
                not sent, adds nothing, and its weight's gradient is 0.
            weights_TK: routing weights, by which a token over the cap on nodes is clipped; without them each
                choice counts the same.
            label: of the exchange.
        """
        ...

    def dispatch(self, rows_TD: Tensor, weights_TK: Tensor, handle: Handle) -> Work[Arrived]:
        """Sends a copy of each token's row, and the weight, to each of its experts."""
        ...

    def combine(self, rows_AD: Tensor, handle: Handle) -> Work[Tensor]:
        """Returns rows_TD, the unweighted sum over each token's experts."""
        ...

    def dispatch_backward(
        self, grad_rows_AD: Tensor, grad_weights_A: Tensor, handle: Handle
    ) -> Work[tuple[Tensor, Tensor]]:
        """Gradients of `dispatch`'s inputs from those of its outputs: rows summed per token (TD), weights (TK)."""
        ...

    def combine_backward(self, grad_rows_TD: Tensor, handle: Handle) -> Work[Tensor]:
        """Computes the gradient of `combine`'s input from that of its output: a copy to each expert's row (AD)."""
        ...

    def close(self) -> None:
        """Gives back what the exchange holds of its own; every rank at the same point, when the lane is through."""
        ...
