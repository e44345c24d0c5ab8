"""Implements the dispatcher of one rank that holds every expert, as the executable specification.

Copies of tokens are sorted by expert, then by token, so that the order never depends on timing.
"""

# Shape legend: N = T K choices, A choices sent.

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from comm.protocol import Arrived, CompletedWork, Handle, Label, RowOrder, Work, own_handle
from kernels.permute import permute, unpermute


@dataclass(frozen=True, slots=True)
class ExpertOrder:
    """Choices that are sent, sorted by expert."""

    order_A: Tensor  # choice t * K + k at each sorted position
    tokens_A: Tensor  # token of each sorted position
    places_TK: Tensor  # sorted position of each choice, negative if the choice is dropped

    def copy_rows(self, rows_TD: Tensor, out_AD: Tensor | None = None) -> Tensor:
        """Copies the token row of each choice in sorted order, into `out_AD` if given; AD."""
        return permute(dense(rows_TD), self.tokens_A, out_AD)

    def copy_weights(self, weights_TK: Tensor) -> Tensor:
        """Returns the weight of each choice in sorted order; A."""
        return weights_TK.flatten().index_select(0, self.order_A)

    def sum_rows(self, rows_AD: Tensor) -> Tensor:
        """Sums the rows of each token in the order of its choices, so the result is deterministic; TD."""
        return unpermute(dense(rows_AD), self.places_TK)

    def restore_weights(self, weights_A: Tensor) -> Tensor:
        """Returns the value of each choice, 0 if the choice is dropped; TK."""
        if len(self.order_A) == self.places_TK.numel():
            return weights_A.index_select(0, self.places_TK.flatten()).view(self.places_TK.shape)
        return restore_values(weights_A, self.places_TK)


@dataclass(frozen=True, slots=True)
class SortedChoices:
    """Choices sorted by expert, dropped ones first. Their number need not be on the host yet."""

    order_N: Tensor  # choice t * K + k at each sorted position
    shape_TK: tuple[int, int]  # tokens and choices per token

    @classmethod
    def sort(cls, ids_TK: Tensor) -> Self:
        """Sorts the choices of a micro-batch without a host synchronization."""
        return cls(ids_TK.flatten().argsort(stable=True), (ids_TK.shape[0], ids_TK.shape[1]))

    def keep(self, num_dropped: int) -> ExpertOrder:
        """Returns the order of the choices that are sent: all except the first `num_dropped`."""
        # Dropped choices, -1, come first in the order, and get negative positions.
        order_A = self.order_N[num_dropped:]
        places_N = inverse_permutation(self.order_N)
        places_N = places_N - num_dropped if num_dropped else places_N
        return ExpertOrder(order_A, order_A // max(1, self.shape_TK[1]), places_N.view(self.shape_TK))


def count_choices(ids_TK: Tensor, num_experts: int) -> Tensor:
    """Counts the dropped choices, then the choices of each expert; int64, 1 + E, on the ids' device."""
    ids_N = ids_TK.flatten()
    # Ids are shifted by one so that -1, no expert, is counted at index 0.
    return ids_N.new_zeros(1 + num_experts).scatter_add_(0, ids_N + 1, torch.ones_like(ids_N))


def inverse_permutation(order_N: Tensor) -> Tensor:
    """Returns the position of each index in a permutation."""
    return torch.empty_like(order_N).scatter_(0, order_N, torch.arange(len(order_N), device=order_N.device))


def restore_values(values_A: Tensor, places_TK: Tensor) -> Tensor:
    """Returns the value at each position, 0 for negative positions; TK."""
    if len(values_A) == 0:
        return values_A.new_zeros(places_TK.shape)
    # A dropped choice reads row 0 and is then set to 0.
    values_TK = values_A.index_select(0, places_TK.flatten().clamp(min=0)).view(places_TK.shape)
    return values_TK.masked_fill(places_TK < 0, 0)


def dense(rows_ND: Tensor) -> Tensor:
    """Returns rows that are each contiguous, as kernels need them; copies only if they are not."""
    return rows_ND if rows_ND.stride(1) == 1 or rows_ND.shape[1] == 1 else rows_ND.contiguous()


class LocalHandle:
    """Routing of one micro-batch. Its first use waits until the counts have been copied to the host."""

    num_tokens: int  # tokens routed, T

    def __init__(self, choices: SortedChoices, read_counts: Callable[[], list[int]]) -> None:
        self.num_tokens = choices.shape_TK[0]
        self._choices = choices
        self._read_counts = read_counts

    @cached_property
    def _numbers(self) -> list[int]:
        return self._read_counts()

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of rows of each expert."""
        return tuple(self._numbers[1:])

    @cached_property
    def order(self) -> ExpertOrder:
        """Order of the experts' rows."""
        return self._choices.keep(self._numbers[0])


def read_later(numbers: Tensor) -> Callable[[], list[int]]:
    """Starts to copy numbers to the host, and returns a function that waits for them alone.

    It does not wait for work that is queued on the device in between.
    """
    if not numbers.is_cuda:
        values: list[int] = numbers.tolist()
        return lambda: values
    host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    host.copy_(numbers, non_blocking=True)
    copied = torch.cuda.current_stream().record_event()

    def read() -> list[int]:
        copied.synchronize()  # host sync
        found: list[int] = host.tolist()
        return found

    return read


class LocalDispatcher:
    """Dispatcher without communication: the executable specification of `comm.protocol.Dispatcher`."""

    def __init__(self, num_experts: int) -> None:
        self.num_local_experts = num_experts

    def plan(self, ids_TK: Tensor, weights_TK: Tensor | None = None, label: Label | None = None) -> Handle:
        """Sorts the choices. On CUDA, the first use of the handle waits for their counts."""
        read_counts = read_later(count_choices(ids_TK, self.num_local_experts))
        return LocalHandle(SortedChoices.sort(ids_TK), read_counts)

    def dispatch(self, rows_TD: Tensor, weights_TK: Tensor, handle: Handle) -> Work[Arrived]:
        """Copies each token's row, with its weight, for each of the token's experts."""
        local = own_handle(handle, LocalHandle)
        rows_AD = local.order.copy_rows(rows_TD.detach())
        return CompletedWork(Arrived(rows_AD, local.order.copy_weights(weights_TK.detach()), local.counts))

    def dispatch_again(self, rows_TD: Tensor, handle: Handle) -> Work[Tensor]:
        """Copies each token's row for each of the token's experts; AD."""
        return CompletedWork(own_handle(handle, LocalHandle).order.copy_rows(rows_TD.detach()))

    def combine(self, rows_AD: Tensor, handle: Handle) -> Work[Tensor]:
        """Returns the unweighted sum over each token's experts; TD."""
        return CompletedWork(own_handle(handle, LocalHandle).order.sum_rows(rows_AD.detach()))

    def dispatch_backward(
        self, grad_rows_AD: Tensor, grad_weights_A: Tensor, handle: Handle
    ) -> Work[tuple[Tensor, Tensor]]:
        """Computes the gradients of rows, summed per token (TD), and of weights (TK)."""
        order = own_handle(handle, LocalHandle).order
        return CompletedWork((order.sum_rows(grad_rows_AD.detach()), order.restore_weights(grad_weights_A.detach())))

    def combine_backward(self, grad_rows_TD: Tensor, handle: Handle) -> Work[Tensor]:
        """Copies each token's gradient for each of its experts' rows; AD."""
        return CompletedWork(own_handle(handle, LocalHandle).order.copy_rows(grad_rows_TD.detach()))

    def local_order(self, handle: Handle) -> tuple[tuple[int, ...], RowOrder]:
        """Returns each expert's number of rows and their order, for a model that copies rows itself."""
        local = own_handle(handle, LocalHandle)
        return local.counts, local.order

    def close(self) -> None:
        """Does nothing: there is nothing to free."""
