"""Sums values of tokens by answer of a pair, and spreads values of answers over their tokens.

Shape legend: K pairs that a sequence can hold (as many as it has tokens).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class AnswerValues:
    """A value of the chosen and of the rejected answer of each pair, both BK; 0 if there is no pair."""

    chosen_BK: Tensor
    rejected_BK: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class PairIndex:
    """Positions of the answers of pairs in a micro-batch. The host never reads the device.

    Attributes:
        slots_BT: column of a table with 2 T + 1 columns: pair k's rejected answer is in column T - k, its chosen answer
            in column T + k, and tokens outside answers are in column T; int64.
        is_pair_BK: whether both answers of pair k + 1 have tokens.
    """

    slots_BT: Tensor
    is_pair_BK: Tensor

    @classmethod
    def of(cls, pair_BT: Tensor) -> "PairIndex":
        """Returns the index from +k for tokens of pair k's chosen answer, and -k for its rejected one.

        Tokens outside answers have 0; k is 1, 2, ... within each sequence.
        """
        length = pair_BT.shape[1]
        slots_BT = pair_BT.long() + length
        counts = _split(_table(slots_BT, torch.ones_like(slots_BT, dtype=torch.float64)))
        return cls(slots_BT, (counts.chosen_BK > 0) & (counts.rejected_BK > 0))

    def sums(self, values_BT: Tensor) -> AnswerValues:
        """Returns the sum of each answer's tokens, float64."""
        return _split(_table(self.slots_BT, values_BT.double()))

    def spread(self, values: AnswerValues) -> Tensor:
        """Returns each token's value of its answer, BT; 0 outside answers."""
        none_B1 = torch.zeros_like(values.chosen_BK[:, :1])
        table = torch.cat([values.rejected_BK.flip(1), none_B1, values.chosen_BK], 1)
        return table.gather(1, self.slots_BT)


def _table(slots_BT: Tensor, values_BT: Tensor) -> Tensor:
    num_sequences, length = slots_BT.shape
    return values_BT.new_zeros(num_sequences, 2 * length + 1).scatter_add_(1, slots_BT, values_BT)


def _split(table: Tensor) -> AnswerValues:
    length = table.shape[1] // 2
    return AnswerValues(table[:, length + 1 :], table[:, :length].flip(1))


@dataclass(frozen=True, slots=True, eq=False)
class PairLoss:
    """Summed loss of pairs, its derivative in each token's -log p or score, and sums to report."""

    loss: Tensor
    slopes_BT: Tensor
    sums: dict[str, Tensor]
