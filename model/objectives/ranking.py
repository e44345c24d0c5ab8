"""Bradley-Terry ranking of two answers by a scalar score, for reward models.

Source: arXiv:2203.02155, section 3.5; centring: arXiv:2312.09244. Shape legend: K pairs of a sequence.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, assert_never

import torch
from torch import Tensor
from torch.nn import functional

from model.config import ModelConfig
from model.head import score_states
from model.linear import WeightSink, deliver_gradient, widen
from model.objective import (
    BALANCE,
    MAIN,
    CrossEntropy,
    MicroBatch,
    Objective,
    OutputHead,
    TaskLoss,
    loss_names,
)
from model.objectives.pairs import ACCURACY, MARGIN_SUM, AnswerValues, PairIndex, PairLoss

SCORE = "score"
MARGIN = "margin"
"""Names of extras: the pair whose answer ends at a token (+k chosen, -k rejected, else 0), and the margin by which the
chosen answer must win, at its last token."""
CENTRE = "centre"
RANKING_LOSSES = (MAIN, CENTRE, ACCURACY, MARGIN_SUM, BALANCE)


RankFunction = Callable[[Tensor], PairLoss]
"""Computes a loss and its derivatives from the scores of all tokens, BT."""


class _RankScores(torch.autograd.Function):
    """Scores every state and ranks them; the loss's derivatives are computed in the forward."""

    @staticmethod
    def forward(
        ctx: Any, normal_BTD: Tensor, weight_1D: Tensor, rank: RankFunction, sink: WeightSink | None
    ) -> tuple[Tensor, Tensor]:
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
