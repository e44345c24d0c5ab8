"""The dispatcher of one rank that holds every expert: what dispatch and combine mean, without any sending.

Shape legend: T tokens, K experts per token, A arrived rows, D hidden size.
"""

from dataclasses import dataclass

from torch import Tensor

from comm.dispatch.expert_order import ExpertOrder, SortedChoices, count_choices
from comm.lane import CompletedWork
from comm.protocol import Arrived, Handle, Label, RowOrder, Work


@dataclass(frozen=True, slots=True)
class LocalHandle:
    """One routing of one micro-batch."""

    order: ExpertOrder
    counts: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens routed."""
        return self.order.places_TK.shape[0]


class LocalDispatcher:
    """The executable specification of `comm.protocol.Dispatcher`."""

    def __init__(self, num_experts: int) -> None:
        self.num_local_experts = num_experts

    def plan(self, ids_TK: Tensor, weights_TK: Tensor | None = None, label: Label | None = None) -> Handle:
        """Sorts the choices; on CUDA the counts cost a host synchronization."""
        num_dropped, *counts = count_choices(ids_TK, self.num_local_experts).tolist()
        return LocalHandle(SortedChoices.sort(ids_TK).keep(num_dropped), tuple(counts))

    def dispatch(self, rows_TD: Tensor, weights_TK: Tensor, handle: Handle) -> Work[Arrived]:
        """Sends a copy of each token's row, and the weight, to each of its experts."""
        local = _own(handle)
        rows_AD = local.order.copy_rows(rows_TD.detach())
        return CompletedWork(Arrived(rows_AD, local.order.copy_weights(weights_TK.detach()), local.counts))

    def combine(self, rows_AD: Tensor, handle: Handle) -> Work[Tensor]:
        """Sums over each token's experts, unweighted; TD."""
        return CompletedWork(_own(handle).order.sum_rows(rows_AD.detach()))

    def dispatch_backward(
        self, grad_rows_AD: Tensor, grad_weights_A: Tensor, handle: Handle
    ) -> Work[tuple[Tensor, Tensor]]:
        """Gradients of rows, summed per token (TD), and of weights (TK)."""
        order = _own(handle).order
        return CompletedWork((order.sum_rows(grad_rows_AD.detach()), order.restore_weights(grad_weights_A.detach())))

    def combine_backward(self, grad_rows_TD: Tensor, handle: Handle) -> Work[Tensor]:
        """Sends a copy of each token's gradient to each of its experts' rows; AD."""
        return CompletedWork(_own(handle).order.copy_rows(grad_rows_TD.detach()))

    def local_order(self, handle: Handle) -> tuple[tuple[int, ...], RowOrder]:
        """Rows of each expert, and their order: for a model that copies and sums rows itself."""
        local = _own(handle)
        return local.counts, local.order

    def close(self) -> None:
        """Does nothing: nothing is held."""


def _own(handle: Handle) -> LocalHandle:
    assert isinstance(handle, LocalHandle)
    return handle
