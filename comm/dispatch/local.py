"""Implements the dispatcher of one rank that holds every expert, as the executable specification."""

from dataclasses import dataclass

from torch import Tensor

from comm.dispatch.expert_order import ExpertOrder, SortedChoices, count_choices
from comm.protocol import Arrived, CompletedWork, Handle, Label, RowOrder, Work, own_handle


@dataclass(frozen=True, slots=True)
class LocalHandle:
    """Routing of one micro-batch."""

    order: ExpertOrder
    counts: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Number of tokens routed, T."""
        return self.order.places_TK.shape[0]


class LocalDispatcher:
    """Dispatcher without communication: the executable specification of `comm.protocol.Dispatcher`."""

    def __init__(self, num_experts: int) -> None:
        self.num_local_experts = num_experts

    def plan(self, ids_TK: Tensor, weights_TK: Tensor | None = None, label: Label | None = None) -> Handle:
        """Sorts the choices. On CUDA, reading the counts is a host synchronization."""
        num_dropped, *counts = count_choices(ids_TK, self.num_local_experts).tolist()  # host sync
        return LocalHandle(SortedChoices.sort(ids_TK).keep(num_dropped), tuple(counts))

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
