"""Objectives of pairs of answers: direct preference optimization, and the ranking of a reward model.

Sources: DPO arXiv:2305.18290, its added cross-entropy arXiv:2407.21783, section 4.1.4; Bradley-Terry ranking
arXiv:2203.02155, section 3.5, its centring arXiv:2312.09244. Shape legend: K pairs that a sequence can hold (as many as
it has tokens).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, assert_never

import torch
from torch import Tensor
from torch.nn import functional

from kernels.cross_entropy.reference import IGNORE
from model.config import ModelConfig
from model.head import score_log_probs, score_states, score_tokens
from model.linear import WeightSink, deliver_gradient, widen
from model.objective import (
    BALANCE,
    MAIN,
    CrossEntropy,
    MicroBatch,
    Objective,
    OutputHead,
    TaskLoss,
    depth_name,
    depth_weights,
    loss_names,
)

PAIR = "pair"
REFERENCE = "reference_log_probs"
"""Names of extras: the pair of the answer whose token a position predicts (+k chosen, -k rejected, else 0), and that
token's log-probability under the reference model."""
ACCURACY = "accuracy"
MARGIN_SUM = "margin"
CHOSEN = "chosen_log_prob"
REJECTED = "rejected_log_prob"
SFT = "sft"
SCORE = "score"
MARGIN = "margin"
"""Names of extras: the pair whose answer ends at a token (+k chosen, -k rejected, else 0), and the margin by which the
chosen answer must win, at its last token."""
CENTRE = "centre"
RANKING_LOSSES = (MAIN, CENTRE, ACCURACY, MARGIN_SUM, BALANCE)


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
        # A pair counts only if this sequence holds tokens of both answers.
        counts = _split(_table(slots_BT, torch.ones_like(slots_BT, dtype=torch.float64)))
        return cls(slots_BT, (counts.chosen_BK > 0) & (counts.rejected_BK > 0))

    def sums(self, values_BT: Tensor) -> AnswerValues:
        """Returns the sum of each answer's tokens, float64."""
        return _split(_table(self.slots_BT, values_BT.double()))

    def spread(self, values: AnswerValues) -> Tensor:
        """Returns each token's value of its answer, BT; 0 outside answers."""
        # The columns of the table again: rejected answers reversed, no answer, chosen answers.
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


def preference_losses(mtp_depth: int) -> tuple[str, ...]:
    """Returns the names of the losses and reported values of preference optimization."""
    depths = (depth_name(depth + 1) for depth in range(mtp_depth))
    return (MAIN, SFT, ACCURACY, MARGIN_SUM, CHOSEN, REJECTED, *depths, BALANCE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Preference:
    """DPO loss of pairs of answers; their tokens are the main targets.

    With m = (log-ratio of the chosen answer) - (log-ratio of the rejected one), where the log-ratio of an answer is its
    log-probability minus that under the reference: -(1 - smoothing) log sigmoid(beta m) - smoothing log sigmoid(-beta
    m) + sft * (nats per token of the chosen answer).

    Attributes:
        factor: 1 / (pairs in the global batch).
        smoothing: probability that a pair's answers are labelled the wrong way round.
        mtp_factors: factor of the summed cross-entropy of chosen answers at each MTP depth.
        balance: weight of the balance loss divided by the sequences in the global batch.
    """

    factor: float
    beta: float
    smoothing: float
    sft: float
    mtp_factors: tuple[float, ...]
    balance: float

    def loss(self, hidden_BTD: Tensor, head: OutputHead, batch: MicroBatch, sink: WeightSink | None) -> TaskLoss:
        """Computes the micro-batch's part of the loss at one depth."""
        if head.depth:
            return self._predict_further(hidden_BTD, head, batch, sink)
        targets_BT = batch.targets_BT[0]
        rows = batch.rows(0)
        pairs = PairIndex.of(batch.extras[PAIR])
        reference_BT = batch.extras[REFERENCE]
        # A slope depends on the log-probabilities of all tokens of both answers. So the head is computed twice.
        log_probs_BT = score_log_probs(hidden_BTD, head.weight_VD, targets_BT, rows)
        compared = self.compare(pairs, log_probs_BT, reference_BT)
        if not torch.is_grad_enabled():
            return TaskLoss(self.factor * compared.loss, compared.sums, log_probs_BT)
        loss, _ = score_tokens(
            hidden_BTD,
            head.weight_VD,
            targets_BT,
            sink,
            value=lambda log_probs_N: compared.loss.to(log_probs_N.dtype),
            slopes=compared.slopes_BT.flatten().to(log_probs_BT.dtype),
            rows=rows,
        )
        return TaskLoss(self.factor * loss, compared.sums, log_probs_BT)

    def compare(self, pairs: PairIndex, log_probs_BT: Tensor, reference_BT: Tensor) -> PairLoss:
        """Computes the summed loss of pairs, its slopes, and reported sums, in float64."""
        is_pair_BK = pairs.is_pair_BK
        beta = self.beta
        smoothing = self.smoothing
        # Sums over the tokens of each answer: [B, K], float64.
        log_probs = pairs.sums(log_probs_BT)
        ratios = pairs.sums(log_probs_BT.double() - reference_BT.double())
        lengths_BK = pairs.sums(torch.ones_like(log_probs_BT)).chosen_BK.clamp_min(1)
        margin_BK = beta * (ratios.chosen_BK - ratios.rejected_BK)
        losses_BK = -(1 - smoothing) * functional.logsigmoid(margin_BK) - smoothing * functional.logsigmoid(-margin_BK)
        nats_BK = -log_probs.chosen_BK / lengths_BK
        # Slopes are derivatives in -log p: a chosen token's is positive, a rejected one's negative.
        slope_BK = beta * ((1 - smoothing) * torch.sigmoid(-margin_BK) - smoothing * torch.sigmoid(margin_BK))
        slopes = AnswerValues((slope_BK + self.sft / lengths_BK) * is_pair_BK, -slope_BK * is_pair_BK)
        sums = {
            MAIN: (losses_BK * is_pair_BK).sum(),
            SFT: (nats_BK * is_pair_BK).sum(),
            ACCURACY: ((margin_BK > 0) & is_pair_BK).sum(),
            MARGIN_SUM: (margin_BK * is_pair_BK).sum(),
            CHOSEN: (log_probs.chosen_BK * is_pair_BK).sum(),
            REJECTED: (log_probs.rejected_BK * is_pair_BK).sum(),
        }
        return PairLoss(sums[MAIN] + self.sft * sums[SFT], pairs.spread(slopes), sums)

    def _predict_further(
        self, hidden_BTD: Tensor, head: OutputHead, batch: MicroBatch, sink: WeightSink | None
    ) -> TaskLoss:
        is_chosen_BT = depth_weights(batch.extras[PAIR] > 0, head.depth)
        targets_BT = batch.targets_BT[head.depth].masked_fill(~is_chosen_BT, IGNORE)
        nats, log_probs_BT = score_tokens(
            hidden_BTD,
            head.weight_VD,
            targets_BT,
            sink,
            value=lambda log_probs_N: -log_probs_N.sum(),
            rows=batch.rows(head.depth),
        )
        loss = self.mtp_factors[head.depth - 1] * nats
        return TaskLoss(loss, {depth_name(head.depth): nats.detach()}, log_probs_BT)


RankFunction = Callable[[Tensor], PairLoss]
"""Computes a loss and its derivatives from the scores of all tokens, BT."""


class _RankScores(torch.autograd.Function):
    """Scores every state and ranks them; the loss's derivatives are computed in the forward."""

    @staticmethod
    def forward(
        ctx: Any, normal_BTD: Tensor, weight_1D: Tensor, rank: RankFunction, sink: WeightSink | None
    ) -> tuple[Tensor, Tensor]:
        # Only last tokens of answers count, but reading all rows needs no host sync.
        scores_BT = score_states(normal_BTD, weight_1D)
        ranked = rank(scores_BT)
        ctx.save_for_backward(normal_BTD, weight_1D, ranked.slopes_BT)
        ctx.sink = sink
        ctx.mark_non_differentiable(scores_BT)
        ctx.set_materialize_grads(False)
        return ranked.loss, scores_BT

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        normal_BTD, weight_1D, slopes_BT = ctx.saved_tensors
        slopes_BT = (slopes_BT * grads[0]).to(torch.promote_types(normal_BTD.dtype, torch.float32))

        def gradient() -> Tensor:
            grad_D: Tensor = slopes_BT.flatten() @ widen(normal_BTD).flatten(0, 1)
            return grad_D[None]

        grad_weight = deliver_gradient(weight_1D, gradient, ctx.sink)
        return (slopes_BT[..., None] * widen(weight_1D)).to(normal_BTD.dtype), grad_weight, None, None


@dataclass(frozen=True, kw_only=True, slots=True)
class PairRanking:
    """Bradley-Terry loss of scores c and r: -log sigmoid(c - r - margin) + centre * (c + r)^2."""

    factor: float
    centre: float
    balance: float

    def loss(self, hidden_BTD: Tensor, head: OutputHead, batch: MicroBatch, sink: WeightSink | None) -> TaskLoss:
        """Computes the micro-batch's part of the loss. Recorded are the scores of all tokens."""
        pairs = PairIndex.of(batch.extras[SCORE])
        margin_BT = batch.extras.get(MARGIN)
        wanted_BK = None if margin_BT is None else pairs.sums(margin_BT).chosen_BK
        reported: dict[str, Tensor] = {}

        def rank(scores_BT: Tensor) -> PairLoss:
            ranked = rank_pairs(pairs, scores_BT, wanted_BK, self.centre)
            reported.update(ranked.sums)
            return ranked

        if torch.is_grad_enabled():
            loss, scores_BT = _RankScores.apply(hidden_BTD, head.weight_VD, rank, sink)  # type: ignore[no-untyped-call]
        else:
            scores_BT = score_states(hidden_BTD, head.weight_VD)
            loss = rank(scores_BT).loss
        return TaskLoss(self.factor * loss, reported, scores_BT)


def head_objective(model: ModelConfig, factor: float) -> tuple[Objective, tuple[str, ...]]:
    """Returns an objective for the head of a model, and the names of its losses."""
    match model.head:
        case "tokens":
            objective = CrossEntropy(factors=(factor,) * (model.mtp_depth + 1), balance=factor)
            return objective, loss_names(model.mtp_depth)
        case "score":
            return PairRanking(factor=factor, centre=0.0, balance=factor), RANKING_LOSSES
        case _ as other:
            assert_never(other)


@dataclass(frozen=True, slots=True)
class KeepScores:
    """Objective of a forward-only pass of a reward model, which records the scores of all tokens."""

    balance: float = 0.0

    def loss(self, hidden_BTD: Tensor, head: OutputHead, batch: MicroBatch, sink: WeightSink | None) -> TaskLoss:
        """Returns the scores, and loss 0."""
        return TaskLoss(hidden_BTD.new_zeros(()), {}, score_states(hidden_BTD, head.weight_VD))


def rank_pairs(pairs: PairIndex, scores_BT: Tensor, margin_BK: Tensor | None, centre: float) -> PairLoss:
    """Computes the summed loss of pairs and its derivative in every score; only last tokens' are read."""
    scores = pairs.sums(scores_BT)
    is_pair_BK = pairs.is_pair_BK
    # Difference and sum of the scores of a pair: ranking and centring.
    apart_BK = scores.chosen_BK - scores.rejected_BK
    together_BK = scores.chosen_BK + scores.rejected_BK
    won_BK = apart_BK if margin_BK is None else apart_BK - margin_BK
    ranking = (-functional.logsigmoid(won_BK) * is_pair_BK).sum()
    centring = (together_BK.square() * is_pair_BK).sum()
    # Derivatives of a pair's loss in the difference and in the sum of its scores.
    in_difference_BK = -torch.sigmoid(-won_BK) * is_pair_BK
    in_sum_BK = 2 * centre * together_BK * is_pair_BK
    slopes_BT = pairs.spread(AnswerValues(in_sum_BK + in_difference_BK, in_sum_BK - in_difference_BK))
    sums = {
        MAIN: ranking,
        CENTRE: centring,
        ACCURACY: ((apart_BK > 0) & is_pair_BK).sum(),
        MARGIN_SUM: (apart_BK * is_pair_BK).sum(),
    }
    return PairLoss(ranking + centre * centring, slopes_BT, sums)
