"""Scores sampled tokens under the distribution that their sampler drew from.

Shape legend: R rows with a target, K kept tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.cross_entropy import linear_cross_entropy
from kernels.cross_entropy.reference import IGNORE, RowScores, RowSlopes
from model.head import score_log_probs
from model.linear import WeightSink
from model.objective import MicroBatch, OutputHead, TaskLoss

ANSWER = "answer"
KEPT = "kept_ids"
"""Names of extras: number of the answer whose token a position predicts (from 1 within its sequence, else 0), and the
tokens among which the sampler drew it, int64 [B, T, K] as in `kernels.cross_entropy`."""


def flat_rows(values: Tensor, rows_R: Tensor | None) -> Tensor:
    """Returns the values [B, T, ...] of the rows that are scored, [R, ...]; None: all."""
    flat = values.flatten(0, 1)
    return flat if rows_R is None else flat[rows_R]


def score_sampled(
    rows_RD: Tensor,
    head_VD: Tensor,
    targets_R: Tensor,
    slopes: RowSlopes | None,
    kept_ids_RK: Tensor | None,
    *,
    temperature: float,
    records: bool,
) -> RowScores:
    """Computes log-probabilities among kept tokens at a temperature, by which rows are divided."""
    scores = linear_cross_entropy(
        *(rows_RD if temperature == 1 else rows_RD / temperature, head_VD, targets_R, slopes),
        wants_rows=records,
        wants_head=records and head_VD.requires_grad,
        kept_ids_NK=kept_ids_RK,
    )
    if scores.rows_ND is not None and temperature != 1:
        scores.rows_ND.div_(temperature)
    return scores


class AnswerIndex:
    """The answers of rows of a micro-batch, of which no function reads the device from the host."""

    def __init__(self, batch: MicroBatch, rows_R: Tensor | None) -> None:
        """Finds the answers of a micro-batch's rows, of which only targets count; None: of all rows."""
        answer_BT = batch.extras[ANSWER].long().masked_fill(batch.targets_BT[0] == IGNORE, 0)
        num_sequences, length = answer_BT.shape
        first_B1 = torch.arange(num_sequences, device=answer_BT.device)[:, None] * (length + 1)
        self.slots_R = flat_rows(answer_BT + first_B1, rows_R)
        self._size = num_sequences * (length + 1)
        self._length = length

    def sums(self, values_R: Tensor) -> Tensor:
        """Returns for each row the sum of its answer's rows, R in float64."""
        return self._table(values_R)[self.slots_R]

    def count(self) -> Tensor:
        """Returns the number of answers that have rows."""
        table = self._table(torch.ones_like(self.slots_R)).view(-1, self._length + 1)
        return (table[:, 1:] > 0).sum()

    def _table(self, values_R: Tensor) -> Tensor:
        empty = torch.zeros(self._size, dtype=torch.float64, device=values_R.device)
        return empty.scatter_add_(0, self.slots_R, values_R.double())


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogProbs:
    """Objective of a forward-only pass that only records log-probabilities, at the sampler's temperature."""

    temperature: float = 1.0
    balance: float = 0.0

    def loss(self, hidden_BTD: Tensor, head: OutputHead, batch: MicroBatch, sink: WeightSink | None) -> TaskLoss:
        """Computes the log-probabilities at depth 0. The loss is 0."""
        if head.depth:
            return TaskLoss(hidden_BTD.new_zeros(()), {})
        found_BT = score_log_probs(
            hidden_BTD,
            head.weight_VD,
            batch.targets_BT[0],
            batch.rows(0),
            temperature=self.temperature,
            kept_ids_BTK=batch.extras.get(KEPT),
        )
        return TaskLoss(found_BT.new_zeros(()), {}, found_BT)
