"""Sorts the rows that DeepEP received by expert, and inverts that order.

DeepEP does not guarantee an order of received rows: an atomic counter assigns a row's slot, and between nodes the rows
of several sources mix. The copy of each row to its experts restores the order.
"""

# Shape legend: R rows received, one for each token with experts here; A arrived rows, one for each of those experts; B
# bytes of a row with its scales.

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from comm.dispatch.expert_order import ExpertOrder
from kernels.permute import permute

Rows = Tensor | tuple[Tensor, Tensor]  # rows in DeepEP's form: bfloat16, or codes of float8_e4m3fn and float32 scales


@dataclass(frozen=True, slots=True)
class DeepEPRoute:
    """Handle of DeepEP and the expert order of its received rows."""

    handle: Any  # DeepEP's `EPHandle`; received rows keep their order as long as it is used
    order: ExpertOrder  # choices r * K + k of received rows in expert order; those of other ranks are dropped
    counts: tuple[int, ...]  # number of rows of each local expert

    @classmethod
    def of(cls, handle: Any, ids_RK: Tensor, num_sources: int) -> Self:
        """Sorts by local expert, then source rank, then token, without a host synchronization.

        Reads the handle's `num_recv_tokens_per_expert_list` and `recv_src_metadata`, whose first column is the source
        token of each row, below `num_sources`. `ids_RK` holds local experts, -1 if the expert is on another rank.
        """
        counts = tuple(handle.num_recv_tokens_per_expert_list)
        sources_R = handle.recv_src_metadata[:, 0].long()
        # Keys sort choices by local expert, then by source token; choices of other ranks come last. RK.
        keys_RK = torch.where(ids_RK < 0, len(counts), ids_RK.long()) * num_sources + sources_R[:, None]
        choices_A = keys_RK.flatten().argsort()[: sum(counts)]
        # The inverse: the position of each choice, -1 for choices of other ranks. RK.
        places_RK = torch.full_like(keys_RK, -1)
        places_RK.view(-1).scatter_(0, choices_A, torch.arange(len(choices_A), device=ids_RK.device))
        order = ExpertOrder(choices_A, choices_A // ids_RK.shape[1], places_RK)
        return cls(handle=handle, order=order, counts=counts)

    def copy_rows(self, rows: Rows) -> Tensor:
        """Copies received rows in expert order: AD, or AB as uint8 with codes, then scales."""
        if isinstance(rows, Tensor):
            return self.order.copy_rows(rows)
        parts = [part.view(torch.uint8) for part in rows]
        rows_AB = parts[0].new_empty(len(self.order.tokens_A), sum(part.shape[1] for part in parts))
        for part, out in zip(parts, rows_AB.split([part.shape[1] for part in parts], 1), strict=True):
            permute(part, self.order.tokens_A, out)
        return rows_AB
