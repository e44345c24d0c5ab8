"""Embedding, output head with scores, and additional parts of MTP modules (arXiv:2412.19437, 2.2)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.cross_entropy import linear_cross_entropy
from kernels.cross_entropy.reference import RowScores, RowSlopes
from kernels.rms_norm import inverse_rms, normalize_backward, rms_norm
from model.attention.form import Attention
from model.block import Block
from model.config import ModelConfig
from model.linear import Projection, WeightSink, deliver_gradient, deliver_product, widen
from model.norm import RmsNorm
from model.precision.linears import Linears
from model.slices import SharedGradient

ValueFunction = Callable[[Tensor], Tensor]
"""Computes a loss from the log-probabilities of all rows."""
ScoreFunction = Callable[[Tensor, Tensor, Tensor, bool], RowScores]
"""Scores rows [R, D] with a head and targets [R]; with gradients if the last argument is true."""


class _SplitEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_VD: Tensor, tokens_BT: Tensor, sink: WeightSink) -> Tensor:
        ctx.save_for_backward(weight_VD, tokens_BT)
        ctx.sink = sink
        return functional.embedding(tokens_BT, weight_VD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        (grad_BTD,) = grads
        weight_VD, tokens_BT = ctx.saved_tensors
        # The closure keeps the tokens and the gradient of their rows until W.
        vocab = len(weight_VD)
        ctx.sink.defer(
            weight_VD,
            lambda: torch.ops.aten.embedding_dense_backward(grad_BTD, tokens_BT, vocab, -1, False),  # noqa: FBT003
        )
        return None, None, None


class Embedding(nn.Module):
    """Token embedding, [vocabulary, hidden]."""

    def __init__(self, vocab: int, hidden: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab, hidden, dtype=dtype))

    def forward(self, tokens_BT: Tensor, sink: WeightSink | None) -> Tensor:
        """Looks up tokens, BT -> BTD. With a sink, the weight's gradient waits for its W."""
        if sink is None or not torch.is_grad_enabled():
            return functional.embedding(tokens_BT, self.weight)
        out: Tensor = _SplitEmbedding.apply(self.weight, tokens_BT, sink)  # type: ignore[no-untyped-call]
        return out


class SharedHead(nn.Module):
    """Own norm of an MTP module; the head's matrix belongs to the main model."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = RmsNorm(config.hidden_size, config.norm_eps, dtype)


class _Merge(torch.autograd.Function):
    """Computes [norm(embedded), norm(hidden)] projection^T; the backward computes both norms again."""

    @staticmethod
    def forward(
        ctx: Any,
        embedded: Tensor,
        hidden: Tensor,
        enorm_D: Tensor,
        hnorm_D: Tensor,
        projection_DE: Tensor,
        eps: float,
        sink: WeightSink | None,
    ) -> Tensor:
        ctx.save_for_backward(embedded, hidden, enorm_D, hnorm_D, projection_DE)
        ctx.eps = eps
        ctx.sink = sink
        return functional.linear(_normalize_both(embedded, hidden, enorm_D, hnorm_D, eps), projection_DE)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        embedded, hidden, enorm_D, hnorm_D, projection_DE = ctx.saved_tensors
        grad = grads[0]
        eps = ctx.eps

        def rows() -> Tensor:
            # Both norms again: [..., 2 D]. They are cheaper to compute than to keep until W.
            return _normalize_both(embedded, hidden, enorm_D, hnorm_D, eps).flatten(0, -2)

        grad_projection = deliver_product(projection_DE, grad.flatten(0, -2), rows, ctx.sink)
        # The gradient of [norm(embedded), norm(hidden)], then back through each norm.
        grad_left, grad_right = (grad @ projection_DE).chunk(2, -1)
        grad_embedded, grad_enorm = normalize_backward(
            grad_left, embedded, inverse_rms(embedded, enorm_D, eps), enorm_D
        )
        grad_hidden, grad_hnorm = normalize_backward(grad_right, hidden, inverse_rms(hidden, hnorm_D, eps), hnorm_D)
        return grad_embedded, grad_hidden, grad_enorm, grad_hnorm, grad_projection, None, None


def _normalize_both(embedded: Tensor, hidden: Tensor, enorm_D: Tensor, hnorm_D: Tensor, eps: float) -> Tensor:
    return torch.cat((rms_norm(embedded, enorm_D, eps)[0], rms_norm(hidden, hnorm_D, eps)[0]), -1)


class MtpBlock(Block):
    """An MTP module: a whole MoE layer, the projection of [norm(embedding), norm(hidden)], a final norm."""

    def __init__(
        self, config: ModelConfig, experts: range, dtype: torch.dtype, attention: Attention, linears: Linears
    ) -> None:
        super().__init__(config, experts, dtype, attention, linears)
        hidden = config.hidden_size
        eps = config.norm_eps
        self.enorm = RmsNorm(hidden, eps, dtype)
        self.hnorm = RmsNorm(hidden, eps, dtype)
        self.eh_proj = Projection(2 * hidden, hidden, dtype)
        self.shared_head = SharedHead(config, dtype)

    def merge(self, embedded_BTD: Tensor, hidden_BTD: Tensor, sink: WeightSink | None) -> Tensor:
        """Returns the block's input, BTD, from the embedding k tokens ahead and the previous depth's state."""
        norms = (self.enorm.weight, self.hnorm.weight)
        out: Tensor = _Merge.apply(  # type: ignore[no-untyped-call]
            embedded_BTD, hidden_BTD, *norms, self.eh_proj.weight, self.enorm.eps, sink
        )
        return out


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
