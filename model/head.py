"""Scores of the output head: losses of log-probabilities, whose gradients are computed with them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.cross_entropy import linear_cross_entropy
from kernels.cross_entropy.reference import RowScores, RowSlopes
from model.linear import WeightSink, deliver_gradient, widen
from model.slices import SharedGradient

ValueFunction = Callable[[Tensor], Tensor]
"""Computes a loss from the log-probabilities of all rows."""
ScoreFunction = Callable[[Tensor, Tensor, Tensor, bool], RowScores]
"""Scores rows [R, D] with a head and targets [R]; with gradients if the last argument is true."""


@dataclass(frozen=True, slots=True)
class _Scoring:
    score: ScoreFunction
    value: ValueFunction
    sink: WeightSink | None
    rows_R: Tensor | None
    shared: SharedGradient | None


class _ScoreTokens(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        normal_ND: Tensor,
        head_VD: Tensor,
        targets_N: Tensor,
        scoring: _Scoring,
        records: bool,  # noqa: FBT001
    ) -> tuple[Tensor, Tensor]:
        rows_R = scoring.rows_R
        num_rows = len(normal_ND)
        # Prompts and padding have no target, so their rows never reach the vocabulary: ND becomes RD.
        if rows_R is not None:
            normal_ND = normal_ND[rows_R]
            targets_N = targets_N[rows_R]
        # Log-probabilities and, if needed, both gradients in one pass over the logits, a few rows at a time.
        scores = scoring.score(normal_ND, head_VD, targets_N, records)
        log_probs_N = scores.log_probs_N
        # Back to all rows, with 0 where there is no target.
        if rows_R is not None:
            log_probs_N = log_probs_N.new_zeros(num_rows).index_copy_(0, rows_R, log_probs_N)
        # The states' and the matrix's gradients, not the logits, wait for the backward.
        if records:
            shared = scoring.shared
            grad_head_VD = scores.head_VD if shared is None else shared.add(scores.head_VD)
            ctx.save_for_backward(scores.rows_ND, grad_head_VD, head_VD, rows_R)
            ctx.sink = scoring.sink
            ctx.shared = shared
            ctx.num_rows = num_rows
        ctx.mark_non_differentiable(log_probs_N)
        ctx.set_materialize_grads(False)
        return scoring.value(log_probs_N), log_probs_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Gradients were computed for a loss with factor 1.
        factor = grads[0]
        grad_ND, grad_head_VD, head_VD, rows_R = ctx.saved_tensors
        grad_head = None
        if grad_head_VD is not None:
            if ctx.shared is not None:
                ctx.shared.end()
            grad_head = deliver_gradient(head_VD, lambda: grad_head_VD.mul_(factor), ctx.sink)
        grad_ND = grad_ND.mul_(factor)
        # Rows without a target have no gradient.
        if rows_R is not None:
            grad_ND = grad_ND.new_zeros(ctx.num_rows, grad_ND.shape[1]).index_copy_(0, rows_R, grad_ND)
        return grad_ND, grad_head, None, None, None


def _slopes_of_rows(row_slopes: RowSlopes | None, rows_R: Tensor, num_rows: int) -> RowSlopes | None:
    """Returns the slopes of selected rows. A function of all rows receives 0 for the others."""
    if row_slopes is None:
        return None
    if isinstance(row_slopes, Tensor):
        return row_slopes[rows_R]

    def slopes(log_probs_C: Tensor, chunk: slice) -> Tensor:
        rows_C = rows_R[chunk]
        # The caller's function knows all rows only, so the chunk is put into its place among them.
        log_probs_N = log_probs_C.new_zeros(num_rows).index_copy_(0, rows_C, log_probs_C)
        return row_slopes(log_probs_N, slice(0, num_rows))[rows_C]

    return slopes


def score_tokens(
    normal_BTD: Tensor,
    head_VD: Tensor,
    targets_BT: Tensor,
    sink: WeightSink | None,
    *,
    value: ValueFunction,
    slopes: RowSlopes | None = None,
    rows: Tensor | None = None,
    shared: SharedGradient | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes a loss that is a function of the targets' log-probabilities.

    Gradients are computed in the forward, so that logits are computed once, for a few rows at a time.

    Args:
        targets_BT: int64, below V; -100 if nothing is predicted, for which the log-probability is 0.
        value: computes the loss, a scalar, from the log-probabilities of all rows, [BT] in float32 or wider.
        slopes: derivative of the loss in -log p of each row: [BT], or a function of log-probabilities (see
            `kernels.cross_entropy`); None means 1 for every row.
        rows: numbers of all rows that have a target (`MicroBatch.target_rows`); None: the head reads all rows.
        shared: sum of the matrix's gradients over slices with equal factors of their losses; None: no slices.

    Returns:
        The loss, whose gradient is that of sum(slopes * -log p), and the log-probabilities, BT, without gradient.
    """
    num_rows = targets_BT.numel()
    row_slopes = slopes if rows is None else _slopes_of_rows(slopes, rows, num_rows)

    def score(rows_RD: Tensor, weight_VD: Tensor, targets_R: Tensor, records: bool) -> RowScores:  # noqa: FBT001
        wants_head = records and weight_VD.requires_grad
        return linear_cross_entropy(
            rows_RD, weight_VD, targets_R, row_slopes, wants_rows=records, wants_head=wants_head
        )

    return score_rows(normal_BTD, head_VD, targets_BT, sink, score=score, value=value, rows=rows, shared=shared)


def score_rows(
    normal_BTD: Tensor,
    head_VD: Tensor,
    targets_BT: Tensor,
    sink: WeightSink | None,
    *,
    score: ScoreFunction,
    value: ValueFunction,
    rows: Tensor | None,
    shared: SharedGradient | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes a loss; `score` computes its gradients with the log-probabilities, as `score_tokens`."""
    scoring = _Scoring(score, value, sink, rows, shared)
    loss, log_probs_N = _ScoreTokens.apply(  # type: ignore[no-untyped-call]
        normal_BTD.flatten(0, 1), head_VD, targets_BT.flatten(), scoring, torch.is_grad_enabled()
    )
    return loss, log_probs_N.view_as(targets_BT)


@torch.no_grad()
def score_log_probs(
    normal_BTD: Tensor,
    head_VD: Tensor,
    targets_BT: Tensor,
    rows: Tensor | None = None,
    *,
    temperature: float = 1.0,
    kept_ids_BTK: Tensor | None = None,
) -> Tensor:
    """Returns the log-probabilities of targets, BT, 0 where there is none, without gradient.

    Args:
        temperature: divisor of the logits. The states are divided, which are much shorter.
        kept_ids_BTK: tokens among which a sampler drew the target, as in `kernels.cross_entropy`.
    """
    # All rows, or those with a target: [N, D] or [R, D].
    normal_ND = normal_BTD.flatten(0, 1)
    targets_N = targets_BT.flatten()
    kept_ids_NK = None if kept_ids_BTK is None else kept_ids_BTK.flatten(0, 1)
    if rows is not None:
        normal_ND = normal_ND[rows]
        targets_N = targets_N[rows]
        kept_ids_NK = None if kept_ids_NK is None else kept_ids_NK[rows]
    normal_ND = normal_ND if temperature == 1 else normal_ND / temperature
    log_probs_N = linear_cross_entropy(
        normal_ND, head_VD, targets_N, wants_rows=False, wants_head=False, kept_ids_NK=kept_ids_NK
    ).log_probs_N
    if rows is not None:
        log_probs_N = log_probs_N.new_zeros(targets_BT.numel()).index_copy_(0, rows, log_probs_N)
    return log_probs_N.view_as(targets_BT)


def score_states(normal_BTD: Tensor, weight_1D: Tensor) -> Tensor:
    """Returns the score of each state, BT in float32 or wider: 16 bits would lose small differences."""
    scores_BT1: Tensor = widen(normal_BTD) @ widen(weight_1D).t()
    return scores_BT1.squeeze(-1)
