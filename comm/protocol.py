"""Defines what the model knows of other ranks: protocols of the dispatcher and the context group.

Shape legend: A arrived rows, E local experts.

The ranks of a context group share each sequence. They exchange rows: what attention of other tokens needs of a rank's
tokens, as a tuple of tensors of equal shapes on all ranks. Every rank of the group must make the same calls in
the same order. Sequences are cut into 2c equal segments, of which rank i of c holds segments i and 2c - 1 - i. A token
attends to all tokens before it, so a rank with an early and a late segment has as much work as every other rank.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
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
    """Applies a function to the result of other work, in `wait` and on the compute lane."""

    def __init__(self, work: Work[SourceT], function: Callable[[SourceT], ResultT]) -> None:
        self._work = work
        self._function = function

    def wait(self) -> ResultT:
        """Waits for the other work and returns the function of its result. Raises the error of either."""
        result = self._work.wait()
        with torch.no_grad():
            return self._function(result)


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
    """Dispatcher that leaves rows on this rank unchanged, so that the model can copy and sum them itself."""

    def local_order(self, handle: Handle) -> tuple[tuple[int, ...], RowOrder]:
        """Returns the number of rows of each expert, on the host, and the order of all rows."""
        ...


@runtime_checkable
class CopyingDispatcher(Protocol):
    """Dispatcher that may send rows to copies of experts, as `comm.dispatch.balanced` does.

    Copies differ for every plan. The counts of arrived rows have S more parts, for the copies in this rank's slots.
    Every rank of the expert group must make the same calls in the same order.
    """

    num_slots: int

    def has_copies(self, handle: Handle) -> bool:
        """Returns whether any rank has a copy; waits on the host until the lane has planned."""
        ...

    def copy_weights(self, weights: Sequence[Tensor], slots: Sequence[Tensor], handle: Handle) -> Work[None]:
        """Sends parts of experts, by expert (L), to the slots of their copies, by slot (S)."""
        ...

    def return_gradients(self, gradient: Tensor, handle: Handle) -> Work[list[tuple[int, Tensor]]]:
        """Sends gradients of S copies to their experts; returns sums by local expert, in a fixed order."""
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


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceParts:
    """Consecutive segments of sequences, and the members that hold them."""

    edges: tuple[int, ...]  # first token of each segment, then the number of tokens of a whole sequence
    held: tuple[tuple[int, ...], ...]  # segments of each member, ascending

    @property
    def num_tokens(self) -> int:
        """Number of tokens of a whole sequence."""
        return self.edges[-1]

    def slices(self, index: int) -> tuple[slice, ...]:
        """Returns the places of a member's tokens in a whole sequence."""
        return tuple(slice(self.edges[segment], self.edges[segment + 1]) for segment in self.held[index])

    def tokens_of(self, index: int) -> int:
        """Returns the number of tokens of a sequence that a member holds."""
        return sum(part.stop - part.start for part in self.slices(index))

    def take(self, values: Tensor, index: int, dim: int = 1) -> Tensor:
        """Returns what a member holds of whole sequences, in its order; a view if it has one segment."""
        parts = [values.narrow(dim, part.start, part.stop - part.start) for part in self.slices(index)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def put(self, part_BT: Tensor, index: int, whole_BT: Tensor) -> None:
        """Writes what a member holds to its places in whole sequences; reverses `take` along dimension 1."""
        start = 0
        for part in self.slices(index):
            tokens = part.stop - part.start
            whole_BT[:, part] = part_BT[:, start : start + tokens]
            start += tokens


def segments_of(index: int, size: int) -> tuple[int, int]:
    """Returns the two segments that a rank holds, in order."""
    return index, 2 * size - 1 - index


def segment_tokens(num_tokens: int, size: int) -> int:
    """Returns the tokens of a segment of a whole sequence; raises ValueError if they would not be equal."""
    if num_tokens % (2 * size) and size > 1:
        nearest = max(1, round(num_tokens / (2 * size))) * 2 * size
        raise ValueError(
            f"context: the length of a sequence must be a multiple of {2 * size}, two segments for each of {size} "
            f"ranks, is {num_tokens}; nearest valid: {nearest}"
        )
    return num_tokens // (2 * size)


@lru_cache(maxsize=256)
def zigzag_parts(num_tokens: int, size: int) -> SequenceParts:
    """Returns which tokens of a whole sequence each rank holds; raises ValueError as `segment_tokens`."""
    if size == 1:
        return SequenceParts(edges=(0, num_tokens), held=((0,),))
    tokens = segment_tokens(num_tokens, size)
    segments = tuple(segments_of(index, size) for index in range(size))
    return SequenceParts(edges=tuple(range(0, num_tokens + 1, tokens)), held=segments)


def sliced_parts(lengths: Sequence[int], size: int) -> SequenceParts:
    """Returns which tokens each rank holds of each slice; member s x size + r is rank r of slice s.

    Raises:
        ValueError: as `segment_tokens`.
    """
    edges = [0]
    held: list[tuple[int, ...]] = []
    for length in lengths:
        part = zigzag_parts(length, size)
        first = len(edges) - 1
        held += [tuple(first + segment for segment in segments) for segments in part.held]
        edges += [edges[first] + edge for edge in part.edges[1:]]
    return SequenceParts(edges=tuple(edges), held=tuple(held))


Rows = tuple[Tensor, ...]  # what attention needs of one rank's tokens

Contribution = Callable[[int, Rows], Tensor]
"""Returns this rank's part of the gradient of the rows of a rank, given the rank's index and rows."""


class ContextGroup(Protocol):
    """Members that hold one part of each sequence each: ranks, or consecutive slices on one rank."""

    @property
    def size(self) -> int:
        """Number of ranks, c."""
        ...

    @property
    def index(self) -> int:
        """Index of this rank in the group."""
        ...

    def parts(self, own_tokens: int) -> SequenceParts:
        """Returns which tokens each member holds, given the number of tokens of a sequence on this rank."""
        ...

    @property
    def keeps_rows(self) -> bool:
        """Whether a caller should keep the rows of other ranks between `visit` and `collect`."""
        ...

    def visit(self, rows: Rows) -> Iterator[tuple[int, Rows]]:
        """Sends this rank's rows and yields the index and rows of every rank, first its own.

        The caller must take all of them. Other ranks' rows travel while the caller works on those before.
        """
        ...

    def collect(self, rows: Rows, kept: Mapping[int, Rows], contribute: Contribution) -> Work[Tensor]:
        """Returns the gradient of this rank's rows, summed over the group in a fixed order.

        `kept` holds rows of other ranks if `keeps_rows`; otherwise they are sent again. `contribute` is called for each
        rank.
        """
        ...

    def sum(self, values: Tensor) -> Tensor:
        """Returns the sum of a small tensor over the group, equal bit for bit on all ranks. No gradient flows."""
        ...


class SingleRankContext:
    """Implements `ContextGroup` for one rank, without communication."""

    size = 1
    index = 0
    keeps_rows = True

    def parts(self, own_tokens: int) -> SequenceParts:
        """Implements `ContextGroup.parts`."""
        return zigzag_parts(own_tokens, 1)

    def visit(self, rows: Rows) -> Iterator[tuple[int, Rows]]:
        """Implements `ContextGroup.visit`."""
        yield 0, rows

    def collect(self, rows: Rows, kept: Mapping[int, Rows], contribute: Contribution) -> Work[Tensor]:
        """Implements `ContextGroup.collect`."""
        return CompletedWork(contribute(0, rows))

    def sum(self, values: Tensor) -> Tensor:
        """Implements `ContextGroup.sum`."""
        return values


ALONE = SingleRankContext()  # the context group of a rank that holds whole sequences
