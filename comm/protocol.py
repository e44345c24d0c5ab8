"""Defines the Dispatcher protocol and its results: the only part of the exchange that the model uses.

Shape legend: A arrived rows, E local experts.
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
    """Pending work on the comm lane."""

    def wait(self) -> T_co:
        """Waits until the compute lane may use the result and returns it. Raises the error of the work."""
        ...


class CompletedWork(Generic[ResultT]):
    """Work that is complete from the start."""

    def __init__(self, result: ResultT) -> None:
        self._result = result

    def wait(self) -> ResultT:
        """Returns the result."""
        return self._result


class MappedWork(Generic[SourceT, ResultT]):
    """Work whose result is a function of other work's result; it runs in `wait`, on the compute lane."""

    def __init__(self, work: Work[SourceT], function: Callable[[SourceT], ResultT]) -> None:
        self._work = work
        self._function = function

    def wait(self) -> ResultT:
        """Waits for the other work and returns the function of its result. Raises the error of either."""
        given = self._work.wait()
        with torch.no_grad():
            return self._function(given)


@dataclass(frozen=True, slots=True)
class Label:
    """Owner of an exchange, for logs and counters only. `micro_batch` counts within its direction."""

    layer: int
    direction: int
    micro_batch: int

    def __str__(self) -> str:
        return f"layer {self.layer}, direction {self.direction}, micro-batch {self.micro_batch}"


class Handle(Protocol):
    """Routing of one micro-batch, made by `Dispatcher.plan` and used by all its exchanges."""

    @property
    def num_tokens(self) -> int:
        """Number of tokens of this rank, T."""
        ...


HandleT = TypeVar("HandleT", bound=Handle)


def own_handle(handle: Handle, kind: type[HandleT]) -> HandleT:
    """Returns a handle that must be one of the dispatcher's own, of this type."""
    assert isinstance(handle, kind)
    return handle


class RowOrder(Protocol):
    """Order in which copies of tokens go to experts, and its inverse."""

    @property
    def tokens_A(self) -> Tensor:
        """Token of each row in expert order; A, int64."""
        ...

    def copy_rows(self, rows_TD: Tensor) -> Tensor:
        """Copies token rows into expert order; AD."""
        ...

    def copy_weights(self, weights_TK: Tensor) -> Tensor:
        """Copies routing weights into expert order; A."""
        ...

    def sum_rows(self, rows_AD: Tensor) -> Tensor:
        """Sums the rows of each token; TD."""
        ...

    def restore_weights(self, weights_A: Tensor) -> Tensor:
        """Returns values in expert order to the token choices that they belong to; TK."""
        ...


@runtime_checkable
class RankLocalDispatcher(Protocol):
    """Dispatcher whose rows stay on this rank unchanged, so that the model can copy and sum them itself."""

    def local_order(self, handle: Handle) -> tuple[tuple[int, ...], RowOrder]:
        """Returns the number of rows of each expert, on the host, and the order of all rows."""
        ...


@dataclass(frozen=True, slots=True)
class Arrived:
    """Rows that arrived at their experts' rank, sorted by local expert.

    Attributes:
        weights_A: routing weight of each row, float.
        counts: number of rows of each local expert, on the host.
    """

    rows_AD: Tensor
    weights_A: Tensor
    counts: tuple[int, ...]


class Dispatcher(Protocol):
    """Sends token rows to the experts' ranks and back, with explicit calls outside autograd.

    The backward of `dispatch` is a combine with the same handle that also returns the weights' gradients. The backward
    of `combine` is a dispatch of the gradient. Every rank of the expert group must make the same calls in the same
    order.
    """

    num_local_experts: int

    def plan(self, ids_TK: Tensor, weights_TK: Tensor | None = None, label: Label | None = None) -> Handle:
        """Starts the exchange of counts.

        Args:
            ids_TK: global expert ids, int64, distinct within a row. An id of -1 means no expert: the choice is not
                sent, adds nothing to the sum, and its weight gets a gradient of 0.
            weights_TK: routing weights. They decide which experts a token over the node cap keeps; without them all
                choices count equally.
        """
        ...

    def dispatch(self, rows_TD: Tensor, weights_TK: Tensor, handle: Handle) -> Work[Arrived]:
        """Sends a copy of each token's row, with its weight, to each of the token's experts."""
        ...

    def dispatch_again(self, rows_TD: Tensor, handle: Handle) -> Work[Tensor]:
        """Sends rows again without weights, in the same order, AD, for a backward that kept no arrived rows."""
        ...

    def combine(self, rows_AD: Tensor, handle: Handle) -> Work[Tensor]:
        """Returns the unweighted sum over each token's experts; TD."""
        ...

    def dispatch_backward(
        self, grad_rows_AD: Tensor, grad_weights_A: Tensor, handle: Handle
    ) -> Work[tuple[Tensor, Tensor]]:
        """Computes the gradients of `dispatch`'s inputs from those of its outputs: rows (TD) and weights (TK)."""
        ...

    def combine_backward(self, grad_rows_TD: Tensor, handle: Handle) -> Work[Tensor]:
        """Computes the gradient of `combine`'s input (AD): a copy of its output's gradient per expert."""
        ...

    def close(self) -> None:
        """Frees buffers and groups. Every rank calls it at the same point, after the lane has finished."""
        ...
