"""Log-probabilities and gradients of a linear head, without storing the logits of all rows.

Every objective that scores tokens is computed here: its gradient in a row's hidden state is one number, the slope,
times the gradient of the row's cross-entropy, -log p.
"""

# Shape legend: N rows, C rows of a chunk, D hidden size, V vocabulary, K kept tokens of a row, M rows whose target has
# the largest logit.

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE = -100
CHUNK_LOGITS = 2**19
CHUNK_LOGITS_16_BIT = 2**22
SMALLEST_CHUNK_ROWS = 64

SlopeFunction = Callable[[Tensor, slice], Tensor]
"""Computes the slopes of a chunk's rows from their log-probabilities and their position among all rows."""
RowSlopes = Tensor | SlopeFunction


@dataclass(frozen=True, slots=True)
class RowScores:
    """Log-probabilities, 0 for a target of -100, in float32 or wider, and the requested gradients."""

    log_probs_N: Tensor
    rows_ND: Tensor | None
    head_VD: Tensor | None


def chunk_rows(num_rows: int, vocab_size: int, dtype: torch.dtype) -> int:
    """Returns the rows whose logits are computed at a time: they fit a cache, more pay off for 16 bits."""
    most = CHUNK_LOGITS_16_BIT if dtype in (torch.bfloat16, torch.float16) else CHUNK_LOGITS
    return min(num_rows, max(SMALLEST_CHUNK_ROWS, most // vocab_size))


def linear_cross_entropy(
    rows_ND: Tensor,
    head_VD: Tensor,
    targets_N: Tensor,
    row_slopes: RowSlopes | None = None,
    *,
    wants_rows: bool,
    wants_head: bool,
    kept_ids_NK: Tensor | None = None,
) -> RowScores:
    """Computes log softmax(rows head^T)[target] of each row and the requested gradients, chunk by chunk.

    The gradients are those of the sum over rows of slope * -log_prob, with constant slopes. Each chunk's logits are
    computed once, in float32 or wider starting with the product, and used for log-probabilities and gradients.

    Args:
        targets_N: int64, below V; rows with -100 are ignored.
        row_slopes: slopes [N], or a function of a chunk's log-probabilities that returns them, [C]; None means 1.
        kept_ids_NK: int64, the tokens that a row's softmax is over, filled with -1. A target outside them has
            log-probability minus infinity; other logits have gradient 0. A row that begins with -1 keeps all.

    Raises:
        RuntimeError: a target is neither below V nor -100, or a kept token is neither below V nor -1.
    """
    check_operands(rows_ND, head_VD, targets_N, row_slopes)
    check_kept_ids(kept_ids_NK, rows_ND)
    wide = torch.promote_types(rows_ND.dtype, torch.float32)
    scores = empty_scores(rows_ND, head_VD, wants_rows=wants_rows, wants_head=wants_head)
    size = max(1, chunk_rows(len(rows_ND), len(head_VD), rows_ND.dtype))
    for first in range(0, len(rows_ND), size):
        chunk = slice(first, first + size)
        targets_C1 = targets_N[chunk, None]
        places_C1 = targets_C1.masked_fill(targets_C1 == IGNORE, 0)
        logits_CV = (rows_ND[chunk] @ head_VD.t()).to(wide)
        if kept_ids_NK is not None:
            exclude_dropped_(logits_CV, kept_ids_NK[chunk])
        logs_CV = torch.log_softmax(logits_CV, -1)
        del logits_CV
        log_probs_C1 = logs_CV.gather(1, places_C1).masked_fill_(targets_C1 == IGNORE, 0)
        scores.log_probs_N[chunk] = log_probs_C1[:, 0]
        if not wants_rows and not wants_head:
            del logs_CV  # frees memory before the next chunk's logits are computed
            continue
        # Derivative of -log p in each logit: softmax minus 1 at the target, also for ignored targets.
        slopes_CV = logs_CV.exp_().scatter_add_(1, places_C1, logs_CV.new_full(places_C1.shape, -1.0))
        add_gradients(scores, chunk, slopes_CV.to(rows_ND.dtype), rows_ND, head_VD, targets_N, row_slopes)
        del logs_CV, slopes_CV  # frees memory before the next chunk's logits are computed
    return scores


def exclude_dropped_(logits_CV: Tensor, kept_ids_CK: Tensor) -> None:
    """Sets the logits of tokens that are not among the kept ones to minus infinity."""
    # Ids are shifted by one, so that column 0 takes the fill value.
    is_kept_CV = torch.zeros(len(logits_CV), logits_CV.shape[1] + 1, dtype=torch.bool, device=logits_CV.device)
    is_kept_CV = is_kept_CV.scatter_(1, kept_ids_CK + 1, True)[:, 1:]
    is_kept_CV |= kept_ids_CK[:, :1] < 0
    logits_CV.masked_fill_(is_kept_CV.logical_not_(), float("-inf"))


def empty_scores(rows_ND: Tensor, head_VD: Tensor, *, wants_rows: bool, wants_head: bool) -> RowScores:
    """Allocates the results of `linear_cross_entropy`; the head's gradient is zero if there are no rows."""
    wide = torch.promote_types(rows_ND.dtype, torch.float32)
    grad_head_VD = torch.empty_like(head_VD, dtype=wide) if wants_head else None
    if grad_head_VD is not None and not len(rows_ND):
        grad_head_VD.zero_()
    return RowScores(
        rows_ND.new_empty(len(rows_ND), dtype=wide), torch.empty_like(rows_ND) if wants_rows else None, grad_head_VD
    )


def add_gradients(
    scores: RowScores,
    chunk: slice,
    slopes_CV: Tensor,
    rows_ND: Tensor,
    head_VD: Tensor,
    targets_N: Tensor,
    row_slopes: RowSlopes | None,
) -> None:
    """Adds a chunk's part to the gradients in `scores`; `slopes_CV`: derivatives of -log p in the logits."""
    rows_CD = rows_ND[chunk]
    is_ignored_C1 = targets_N[chunk, None] == IGNORE
    slopes_C = None if row_slopes is None or callable(row_slopes) else row_slopes[chunk]
    if callable(row_slopes):
        slopes_C = row_slopes(scores.log_probs_N[chunk], chunk)
    # The slope scales a row of each product instead of a row of logits, which is much longer.
    if scores.rows_ND is not None:
        grad_CD = torch.mm(slopes_CV, head_VD, out=scores.rows_ND[chunk])
        if slopes_C is not None:
            grad_CD.mul_(slopes_C[:, None])
        grad_CD.masked_fill_(is_ignored_C1, 0)
    if scores.head_VD is not None:
        if slopes_C is not None:
            rows_CD = (rows_CD * slopes_C[:, None]).to(rows_ND.dtype)
        counted_CD = rows_CD.masked_fill(is_ignored_C1, 0)
        add_product(scores.head_VD, slopes_CV.t(), counted_CD, is_first=chunk.start == 0)


def check_operands(rows_ND: Tensor, head_VD: Tensor, targets_N: Tensor, row_slopes: RowSlopes | None = None) -> None:
    """Raises ValueError unless shapes, types and devices of `linear_cross_entropy` match."""
    subject = "linear_cross_entropy"
    if rows_ND.dim() != 2 or head_VD.dim() != 2 or rows_ND.shape[1] != head_VD.shape[1]:
        shapes = f"{list(rows_ND.shape)} and {list(head_VD.shape)}"
        raise ValueError(f"{subject}: rows and head must be matrices of as many columns, got {shapes}")
    if targets_N.shape != rows_ND.shape[:1] or targets_N.dtype != torch.int64:
        given = f"{targets_N.dtype} {list(targets_N.shape)}"
        raise ValueError(f"{subject}: targets must be torch.int64 [{len(rows_ND)}], got {given}")
    if head_VD.dtype != rows_ND.dtype:
        raise ValueError(f"{subject}: head must be {rows_ND.dtype}, as rows are, got {head_VD.dtype}")
    if not rows_ND.device == head_VD.device == targets_N.device:
        given = f"{head_VD.device} and {targets_N.device}"
        raise ValueError(f"{subject}: head and targets must be on {rows_ND.device}, where rows are, got {given}")
    if isinstance(row_slopes, Tensor):
        wide = torch.promote_types(rows_ND.dtype, torch.float32)
        if row_slopes.shape != targets_N.shape or row_slopes.dtype != wide or row_slopes.device != rows_ND.device:
            given = f"{row_slopes.dtype} {list(row_slopes.shape)} on {row_slopes.device}"
            raise ValueError(f"{subject}: row_slopes must be {wide} [{len(rows_ND)}] on {rows_ND.device}, got {given}")


def check_kept_ids(kept_ids_NK: Tensor | None, rows_ND: Tensor) -> None:
    """Raises ValueError unless shape, type and device of kept tokens match the rows."""
    if kept_ids_NK is None:
        return
    given = f"{kept_ids_NK.dtype} {list(kept_ids_NK.shape)} on {kept_ids_NK.device}"
    is_matrix = kept_ids_NK.dim() == 2 and kept_ids_NK.shape[1] > 0 and len(kept_ids_NK) == len(rows_ND)
    if not is_matrix or kept_ids_NK.dtype != torch.int64 or kept_ids_NK.device != rows_ND.device:
        wanted = f"torch.int64 [{len(rows_ND)}, at least 1] on {rows_ND.device}"
        raise ValueError(f"linear_cross_entropy: kept_ids must be {wanted}, got {given}")


def add_product(total_VD: Tensor, left_VC: Tensor, right_CD: Tensor, *, is_first: bool) -> None:
    """Adds left times right to the total in the total's type; overwrites it if `is_first`."""
    if total_VD.dtype == left_VC.dtype:
        torch.addmm(total_VD, left_VC, right_CD, beta=0 if is_first else 1, out=total_VD)
    elif is_first:
        total_VD.copy_(left_VC @ right_CD)
    else:
        total_VD += left_VC @ right_CD


@torch.no_grad()
def greedy_scores(rows_ND: Tensor, head_VD: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Returns log-probabilities, 0 for a target of -100, and whether a target has the first largest logit."""
    check_operands(rows_ND, head_VD, targets_N)
    wide = torch.promote_types(rows_ND.dtype, torch.float32)
    log_probs_N = rows_ND.new_empty(len(rows_ND), dtype=wide)
    are_greedy_N = torch.empty(len(rows_ND), dtype=torch.bool, device=rows_ND.device)
    size = max(1, chunk_rows(len(rows_ND), len(head_VD), rows_ND.dtype))
    for first in range(0, len(rows_ND), size):
        chunk = slice(first, first + size)
        is_ignored_C = targets_N[chunk] == IGNORE
        places_C1 = targets_N[chunk].masked_fill(is_ignored_C, 0)[:, None]
        logs_CV = torch.log_softmax((rows_ND[chunk] @ head_VD.t()).to(wide), -1)
        found_C = logs_CV.gather(1, places_C1)[:, 0]
        is_largest_C = (found_C == logs_CV.amax(-1)) & ~is_ignored_C
        # The first of equal logits is the most probable token. `argmax` is slow, and few rows need it.
        rows_M = is_largest_C.nonzero()[:, 0]  # host sync
        is_largest_C[rows_M] = logs_CV[rows_M].argmax(-1) == targets_N[chunk][rows_M]
        log_probs_N[chunk] = found_C.masked_fill(is_ignored_C, 0)
        are_greedy_N[chunk] = is_largest_C
    return log_probs_N, are_greedy_N
