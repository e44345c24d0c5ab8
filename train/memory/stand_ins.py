"""Dispatcher and context group on tensors without memory, which send nothing.

They allocate what would arrive. Shape legend: as in comm/protocol.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from comm.context_group import GatherContext, LinkedContext, RingContext, Shift
from comm.protocol import ALONE, Arrived, CompletedWork, ContextGroup, Dispatcher, Label, Work


@dataclass(frozen=True, slots=True)
class EvenHandle:
    """Number of tokens, and of the rows that arrive for them."""

    num_tokens: int
    num_choices: int
    num_rows: int


class EvenDispatcher(Dispatcher):
    """Delivers equally many rows to every local expert."""

    def __init__(self, num_local_experts: int, rows: Mapping[int, int]) -> None:
        """Stores the arguments; `rows` is the number of arriving rows by number of tokens."""
        self.num_local_experts = num_local_experts
        self._rows = rows

    def plan(self, ids_TK: Tensor, weights_TK: Tensor | None = None, label: Label | None = None) -> EvenHandle:
        """Implements `Dispatcher.plan`."""
        num_tokens, num_choices = ids_TK.shape
        return EvenHandle(num_tokens, num_choices, self._rows[num_tokens])

    def dispatch(self, rows_TD: Tensor, weights_TK: Tensor, handle: EvenHandle) -> Work[Arrived]:  # type: ignore[override]
        """Implements `Dispatcher.dispatch`."""
        rows_per_expert, rest = divmod(handle.num_rows, self.num_local_experts)
        counts = (rows_per_expert + 1,) * rest + (rows_per_expert,) * (self.num_local_experts - rest)
        rows_AD = rows_TD.new_empty(handle.num_rows, rows_TD.shape[1])
        return CompletedWork(Arrived(rows_AD, weights_TK.new_empty(handle.num_rows), counts))

    def dispatch_again(self, rows_TD: Tensor, handle: EvenHandle) -> Work[Tensor]:  # type: ignore[override]
        """Implements `Dispatcher.dispatch_again`."""
        return CompletedWork(rows_TD.new_empty(handle.num_rows, rows_TD.shape[1]))

    def combine(self, rows_AD: Tensor, handle: EvenHandle) -> Work[Tensor]:  # type: ignore[override]
        """Implements `Dispatcher.combine`."""
        return CompletedWork(rows_AD.new_empty(handle.num_tokens, rows_AD.shape[1]))

    def dispatch_backward(  # type: ignore[override]
        self, grad_rows_AD: Tensor, grad_weights_A: Tensor, handle: EvenHandle
    ) -> Work[tuple[Tensor, Tensor]]:
        """Implements `Dispatcher.dispatch_backward`."""
        weights_TK = grad_weights_A.new_empty(handle.num_tokens, handle.num_choices)
        return CompletedWork((self.combine(grad_rows_AD, handle).wait(), weights_TK))

    def combine_backward(self, grad_TD: Tensor, handle: EvenHandle) -> Work[Tensor]:  # type: ignore[override]
        """Implements `Dispatcher.combine_backward`."""
        return self.dispatch_again(grad_TD, handle)

    def close(self) -> None:
        """Implements `Dispatcher.close`."""


class _Link:
    """Replaces `comm.context_group.ContextLink`."""

    index = 0

    def __init__(self, size: int) -> None:
        self.members = tuple(range(size))

    def start_gather(self, packed: Tensor) -> tuple[Work[None], list[Tensor]]:
        return CompletedWork(None), [torch.empty_like(packed) for _ in self.members]

    def start_exchange(self, parts: Tensor) -> tuple[Work[None], Tensor]:
        return CompletedWork(None), torch.empty_like(parts)

    def start_shift(self, sent: Tensor, name: str) -> Shift:
        return Shift(CompletedWork(None), torch.empty_like(sent))

    def sum(self, values: Tensor) -> Tensor:
        return torch.empty_like(values)


def context_of(size: int, kept_ranks: int) -> ContextGroup:
    """Returns the context group of ranks that share each sequence; they form a ring if they keep no rows."""
    if size == 1:
        return ALONE
    context: type[LinkedContext] = GatherContext if kept_ranks else RingContext
    return context(_Link(size))  # type: ignore[arg-type, return-value]
