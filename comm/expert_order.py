"""The order in which copies of tokens go to experts: by expert, then by token, so that timing never decides it.

Shape legend: T tokens, K experts per token, N = T K copies, D hidden size, E experts.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ExpertOrder:
    """Copies sorted by expert.

    order_N: the copy t * K + k at each sorted place. tokens_N: its token. places_N: the sorted place of
    each copy. counts_E: copies of each expert, on the tokens' device.
    """

    order_N: Tensor
    tokens_N: Tensor
    places_N: Tensor
    counts_E: Tensor
    shape_TK: tuple[int, int]

    @classmethod
    def sort(cls, topk_ids_TK: Tensor, num_experts: int) -> Self:
        """The order of one micro-batch's choices, without a host synchronisation."""
        num_tokens, num_choices = topk_ids_TK.shape
        ids_N = topk_ids_TK.flatten()
        order_N = ids_N.argsort(stable=True)
        return cls(
            order_N=order_N,
            tokens_N=order_N // num_choices,
            places_N=inverse_permutation(order_N),
            counts_E=ids_N.new_zeros(num_experts).scatter_add_(0, ids_N, torch.ones_like(ids_N)),
            shape_TK=(num_tokens, num_choices),
        )

    def copy_rows(self, rows_TD: Tensor) -> Tensor:
        """A row for each copy, sorted; ND."""
        return rows_TD.index_select(0, self.tokens_N)

    def copy_weights(self, weights_TK: Tensor) -> Tensor:
        """The weight of each copy, sorted; N."""
        return weights_TK.flatten().index_select(0, self.order_N)

    def sum_rows(self, rows_ND: Tensor) -> Tensor:
        """The sum over each token's copies in the order of its choices, so bitwise repeatable; TD."""
        num_tokens, num_choices = self.shape_TK
        return rows_ND.index_select(0, self.places_N).view(num_tokens, num_choices, rows_ND.shape[1]).sum(1)

    def restore_weights(self, weights_N: Tensor) -> Tensor:
        """The value of each copy at its choice; TK."""
        return weights_N.index_select(0, self.places_N).view(self.shape_TK)


def inverse_permutation(order_N: Tensor) -> Tensor:
    """The place of each index in a permutation."""
    return torch.empty_like(order_N).scatter_(0, order_N, torch.arange(len(order_N), device=order_N.device))
