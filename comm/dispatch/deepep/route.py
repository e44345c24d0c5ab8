"""Expert order out of what DeepEP received, and back.

DeepEP promises no order of received rows: a row's slot comes from an atomic counter, and between nodes the rows of
several sources mix. The order is restored here, in the one pass that copies each row to its experts.

Shape legend: R rows received, one for each token with experts here; K experts per token; A arrived rows, one for each
of those experts; D hidden size, B bytes of a row with its scales.
"""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from comm.dispatch.expert_order import dense
from kernels.permute import permute, unpermute

Rows = Tensor | tuple[Tensor, Tensor]
"""Rows as DeepEP moves them: bfloat16, or codes of float8_e4m3fn and float32 scales."""


@dataclass(frozen=True, slots=True)
class DeepEPRoute:
    """One layout that DeepEP has made, and where its rows go.

    Attributes:
        handle: DeepEP's `EPHandle`; while it is used, received rows keep their order.
        choices_A: the choice r * K + k at each arrived place.
        rows_A: its received row.
        places_RK: the arrived place of each choice, -1 where the expert is not on this rank.
        counts: arrived rows of each local expert.
    """

    handle: Any
    choices_A: Tensor
    rows_A: Tensor
    places_RK: Tensor
    counts: tuple[int, ...]

    @classmethod
    def of(cls, handle: Any, ids_RK: Tensor, num_sources: int) -> Self:
        """Sorts by local expert, then source rank, then token, without a host synchronization.

        Args:
            handle: of an exchange without expansion. Read are `num_recv_tokens_per_expert_list` and, as the first
                column of `recv_src_metadata`, where in the group each row comes from.
            ids_RK: local experts, -1 where the expert is not on this rank.
            num_sources: above every number in that column.
        """
        counts = tuple(handle.num_recv_tokens_per_expert_list)
        sources_R = handle.recv_src_metadata[:, 0].long()
        # Keys order choices by local expert, then by the source of their row; choices elsewhere come last. RK.
        # Keys order choices by local expert, then by the source of their row; choices elsewhere come last. RK.
        keys_RK = torch.where(ids_RK < 0, len(counts), ids_RK.long()) * num_sources + sources_R[:, None]
        choices_A = keys_RK.flatten().argsort()[: sum(counts)]
        # The inverse: the arrived place of each choice, -1 elsewhere.
        # The inverse: the arrived place of each choice, -1 elsewhere.
        places_RK = torch.full_like(keys_RK, -1)
        places_RK.view(-1).scatter_(0, choices_A, torch.arange(len(choices_A), device=ids_RK.device))
        return cls(
            handle=handle,
            choices_A=choices_A,
            rows_A=choices_A // ids_RK.shape[1],
            places_RK=places_RK,
            counts=counts,
        )

    def copy_rows(self, rows: Rows) -> Tensor:
        """Copies each received row to its experts here, in expert order: AD, or AB, uint8, scales behind codes."""
        if isinstance(rows, Tensor):
            return permute(rows, self.rows_A)
        parts = [part.view(torch.uint8) for part in rows]
        rows_AB = parts[0].new_empty(len(self.rows_A), sum(part.shape[1] for part in parts))
        for part, out in zip(parts, rows_AB.split([part.shape[1] for part in parts], 1), strict=True):
            permute(part, self.rows_A, out)
        return rows_AB

    def copy_weights(self, weights_RK: Tensor) -> Tensor:
        """Returns the weight of each arrived row, A, without the weights of experts elsewhere that DeepEP adds."""
        return weights_RK.flatten().index_select(0, self.choices_A)

    def sum_rows(self, rows_AD: Tensor) -> Tensor:
        """Sums over each received row's experts here, in the order of its choices, rounded once; RD."""
        return unpermute(dense(rows_AD), self.places_RK)

    def restore_weights(self, weights_A: Tensor) -> Tensor:
        """Returns the value of each arrived row at its choice, 0 for experts elsewhere; RK."""
        weights_RK = weights_A.new_zeros(self.places_RK.shape)
        weights_RK.view(-1).scatter_(0, self.choices_A, weights_A)
        return weights_RK
