"""Log-probabilities and gradients of a linear head, without storing the logits of all rows.

Every objective that scores tokens is computed here: its gradient in a row's hidden state is one number, the slope,
times the gradient of the row's cross-entropy, -log p. So is the divergence from a teacher's distribution.
"""

# Shape legend: N rows, C rows of a chunk, D hidden size, V vocabulary, K kept tokens of a row, M rows whose target has
# the largest logit. Distillation: B buckets of a distribution, S hidden size of the teacher, K kept tokens of the
# teacher.

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, assert_never

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
    """Returns how many rows' logits are computed at a time: they fit a cache, more pay off for 16 bits."""
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
        # The most probable token has probability 1 / sum(exp(x - max)), so one pass of exponentials gives both.
        probs_CV = torch.softmax(logits_CV, -1)
        log_sums_C1 = logits_CV.amax(-1, keepdim=True) - probs_CV.amax(-1, keepdim=True).log_()
        log_probs_C1 = (logits_CV.gather(1, places_C1) - log_sums_C1).masked_fill_(targets_C1 == IGNORE, 0)
        scores.log_probs_N[chunk] = log_probs_C1[:, 0]
        del logits_CV
        if wants_rows or wants_head:
            # Derivative of -log p in each logit: softmax minus 1 at the target, also for ignored targets.
            slopes_CV = probs_CV.scatter_add_(1, places_C1, probs_CV.new_full(places_C1.shape, -1.0))
            add_gradients(scores, chunk, slopes_CV.to(rows_ND.dtype), rows_ND, head_VD, targets_N, row_slopes)
            del slopes_CV
        del probs_CV  # frees memory before the next chunk's logits are computed
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
    # Slope of each row: given as numbers, or a function of the log-probabilities of this chunk.
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
        actual = f"{targets_N.dtype} {list(targets_N.shape)}"
        raise ValueError(f"{subject}: targets must be torch.int64 [{len(rows_ND)}], got {actual}")
    if head_VD.dtype != rows_ND.dtype:
        raise ValueError(f"{subject}: head must be {rows_ND.dtype}, as rows are, got {head_VD.dtype}")
    if not rows_ND.device == head_VD.device == targets_N.device:
        actual = f"{head_VD.device} and {targets_N.device}"
        raise ValueError(f"{subject}: head and targets must be on {rows_ND.device}, where rows are, got {actual}")
    if isinstance(row_slopes, Tensor):
        # Slopes are in float32 or wider, as log-probabilities are.
        wide = torch.promote_types(rows_ND.dtype, torch.float32)
        if row_slopes.shape != targets_N.shape or row_slopes.dtype != wide or row_slopes.device != rows_ND.device:
            actual = f"{row_slopes.dtype} {list(row_slopes.shape)} on {row_slopes.device}"
            raise ValueError(f"{subject}: row_slopes must be {wide} [{len(rows_ND)}] on {rows_ND.device}, got {actual}")


def check_kept_ids(kept_ids_NK: Tensor | None, rows_ND: Tensor) -> None:
    """Raises ValueError unless shape, type and device of kept tokens match the rows."""
    if kept_ids_NK is None:
        return
    actual = f"{kept_ids_NK.dtype} {list(kept_ids_NK.shape)} on {kept_ids_NK.device}"
    is_matrix = kept_ids_NK.dim() == 2 and kept_ids_NK.shape[1] > 0 and len(kept_ids_NK) == len(rows_ND)
    if not is_matrix or kept_ids_NK.dtype != torch.int64 or kept_ids_NK.device != rows_ND.device:
        wanted = f"torch.int64 [{len(rows_ND)}, at least 1] on {rows_ND.device}"
        raise ValueError(f"linear_cross_entropy: kept_ids must be {wanted}, got {actual}")


def add_product(total_VD: Tensor, left_VC: Tensor, right_CD: Tensor, *, is_first: bool) -> None:
    """Adds left times right to the total in the total's type; overwrites it if `is_first`."""
    # One call accumulates in place if the types agree; else the product needs separate memory.
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
        # Log-probability of each target, C; an ignored row reads token 0 and is masked below.
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


DivergenceKind = Literal["forward_kl", "reverse_kl", "jensen_shannon"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Divergence:
    """A divergence D(p, q) of teacher p and student q (arXiv:2306.13649, section 3)."""

    # forward_kl: KL(p || q). reverse_kl: KL(q || p). jensen_shannon: beta KL(p || m) + (1 - beta) KL(q || m), with m =
    # beta p + (1 - beta) q.
    kind: DivergenceKind
    beta: float = 0.5  # weight of the teacher in m, above 0 and below 1; ignored by the others
    temperature: float = 1.0  # divisor of the logits of both; its square is a factor of the divergence


def divergence_terms(log_p_CB: Tensor, log_q_CB: Tensor, form: Divergence) -> tuple[Tensor, Tensor]:
    """Returns D(p, q), [C], and dD/du, [C, B], of the log-probabilities, where q = softmax(u)."""
    # Softmax turns dD/dq into dD/du = q (dD/dq - sum(q dD/dq)).
    q_CB = log_q_CB.exp()
    match form.kind:
        case "forward_kl":
            p_CB = log_p_CB.exp()
            return _kl(p_CB, log_p_CB, log_q_CB), q_CB - p_CB
        case "reverse_kl":
            ratio_CB = log_q_CB - log_p_CB
            value_C = (q_CB * ratio_CB).sum(-1)
            return value_C, q_CB * (ratio_CB - value_C[:, None])
        case "jensen_shannon":
            p_CB = log_p_CB.exp()
            beta = form.beta
            log_m_CB = torch.logaddexp(log_p_CB + math.log(beta), log_q_CB + math.log1p(-beta))
            value_C = beta * _kl(p_CB, log_p_CB, log_m_CB) + (1 - beta) * _kl(q_CB, log_q_CB, log_m_CB)
            # dD/dq = (1 - beta) log(q / m), up to a constant that the softmax removes.
            slope_CB = (1 - beta) * (log_q_CB - log_m_CB)
            return value_C, q_CB * (slope_CB - (q_CB * slope_CB).sum(-1, keepdim=True))
        case _ as other:
            assert_never(other)


def _kl(p_CB: Tensor, log_p_CB: Tensor, log_q_CB: Tensor) -> Tensor:
    """Returns KL(p || q) of each row, where probability 0 adds nothing."""
    terms_CB = p_CB * (log_p_CB - log_q_CB)
    return torch.where(p_CB > 0, terms_CB, 0).sum(-1)


_SMALLEST_REST = 1e-12
"""Least probability of the tokens that a teacher's list leaves out, so that its logarithm is finite."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherStates:
    """A teacher as the input of its head and the head; its logits are computed again, chunk by chunk."""

    rows_NS: Tensor  # states after the teacher's final norm
    head_VS: Tensor  # the teacher's head


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherTopK:
    """A teacher as its most probable tokens; one further token has the rest of the probability."""

    ids_NK: Tensor  # int64, different within a row
    log_probs_NK: Tensor  # at the temperature of the divergence


Teacher = TeacherStates | TeacherTopK


@dataclass(frozen=True, slots=True)
class DistillationScores:
    """Divergences, [N], 0 without a target, and the log-probabilities and gradients of the rows."""

    divergences_N: Tensor
    scores: RowScores


def linear_distillation(
    rows_ND: Tensor,
    head_VD: Tensor,
    targets_N: Tensor,
    teacher: Teacher,
    form: Divergence,
    *,
    mix: tuple[float, float],
    row_weights_N: Tensor | None = None,
    wants_gradients: bool,
) -> DistillationScores:
    """Computes tau^2 D(teacher, student) of each row, and gradients, chunk by chunk.

    The gradients are those of the sum over rows of weight * (mix[0] tau^2 D - mix[1] log_prob). A teacher has no
    gradient. Each chunk's logits are computed once, in float32 or wider after the product. `targets_N` is int64, below
    V, or -100 for ignored rows. `row_weights_N` is in float32 or wider; None means 1.
    """
    check_operands(rows_ND, head_VD, targets_N, row_weights_N)
    _check_teacher(teacher, len(rows_ND), len(head_VD))
    wide = torch.promote_types(rows_ND.dtype, torch.float32)
    scores = empty_scores(rows_ND, head_VD, wants_rows=wants_gradients, wants_head=wants_gradients)
    divergences_N = torch.empty_like(scores.log_probs_N)
    size = max(1, chunk_rows(len(rows_ND), len(head_VD), rows_ND.dtype))
    for first in range(0, len(rows_ND), size):
        chunk = slice(first, first + size)
        is_ignored_C = targets_N[chunk] == IGNORE
        targets_C1 = targets_N[chunk, None]
        places_C1 = targets_C1.masked_fill(targets_C1 == IGNORE, 0)
        # Logits of a chunk, C V, in float32 or wider; the rest of the loop reads no other chunk.
        logits_CV = (rows_ND[chunk] @ head_VD.t()).to(wide)
        logs_CV = torch.log_softmax(logits_CV, -1)
        scores.log_probs_N[chunk] = logs_CV.gather(1, places_C1)[:, 0].masked_fill_(is_ignored_C, 0)
        scaled_CV = logs_CV if form.temperature == 1.0 else torch.log_softmax(logits_CV / form.temperature, -1)
        del logits_CV
        # The divergence and its slopes in u = z / tau: C and C V.
        values_C, slopes_CV = _student_terms(teacher, chunk, scaled_CV, form)
        divergences_N[chunk] = (values_C * form.temperature**2).masked_fill_(is_ignored_C, 0)
        if not wants_gradients:
            continue
        # tau^2 dD/dz = tau dD/du with u = z / tau, mixed with softmax minus 1 at the target.
        slopes_CV.mul_(mix[0] * form.temperature)
        if mix[1]:
            slopes_CV.add_(logs_CV.exp_(), alpha=mix[1])
            slopes_CV.scatter_add_(1, places_C1, slopes_CV.new_full(places_C1.shape, -mix[1]))
        add_gradients(scores, chunk, slopes_CV.to(rows_ND.dtype), rows_ND, head_VD, targets_N, row_weights_N)
        del logs_CV, scaled_CV, slopes_CV  # frees memory before the next chunk's logits are computed
    return DistillationScores(divergences_N, scores)


def _student_terms(teacher: Teacher, chunk: slice, logs_CV: Tensor, form: Divergence) -> tuple[Tensor, Tensor]:
    if isinstance(teacher, TeacherStates):
        logits_CV = (teacher.rows_NS[chunk] @ teacher.head_VS.t()).to(logs_CV.dtype)
        return divergence_terms(torch.log_softmax(logits_CV / form.temperature, -1), logs_CV, form)
    # The student's log-probabilities at the teacher's tokens, C K.
    ids_CK = teacher.ids_NK[chunk]
    log_p_CK = teacher.log_probs_NK[chunk].to(logs_CV.dtype)
    log_q_CK = logs_CV.gather(1, ids_CK)
    if ids_CK.shape[1] == logs_CV.shape[1]:
        values_C, slopes_CK = divergence_terms(log_p_CK, log_q_CK, form)
        return values_C, torch.empty_like(logs_CV).scatter_(1, ids_CK, slopes_CK)
    # One more bucket has what the listed tokens leave of the probability: B = K + 1.
    log_p_CB, log_q_CB = (torch.cat((logs_CK, _log_rest(logs_CK)), -1) for logs_CK in (log_p_CK, log_q_CK))
    values_C, slopes_CB = divergence_terms(log_p_CB, log_q_CB, form)
    # A token that is left out has its share of the rest's derivative: dD/du_v = q_v / q_rest * dD/du_rest.
    share_C1 = slopes_CB[:, -1:] / log_q_CB[:, -1:].exp()
    return values_C, (logs_CV.exp() * share_C1).scatter_(1, ids_CK, slopes_CB[:, :-1])


def _log_rest(logs_CK: Tensor) -> Tensor:
    """Returns the logarithm of the probability that the kept tokens leave, C1."""
    return (1 - logs_CK.exp().sum(-1, keepdim=True)).clamp_min_(_SMALLEST_REST).log_()


def _check_teacher(teacher: Teacher, num_rows: int, vocab: int) -> None:
    subject = "linear_distillation"
    if isinstance(teacher, TeacherStates):
        shapes = list(teacher.rows_NS.shape), list(teacher.head_VS.shape)
        if shapes[0][:1] != [num_rows] or shapes[1][:1] != [vocab] or shapes[0][1:] != shapes[1][1:]:
            raise ValueError(
                f"{subject}: the teacher must have {num_rows} rows and a vocabulary of {vocab}, got rows {shapes[0]} "
                f"and head {shapes[1]}"
            )
        return
    shapes = list(teacher.ids_NK.shape), list(teacher.log_probs_NK.shape)
    if shapes[0] != shapes[1] or shapes[0][:1] != [num_rows] or not 1 <= shapes[0][-1] <= vocab:
        raise ValueError(
            f"{subject}: the teacher's tokens must be [{num_rows}, 1 to {vocab}] and have log-probabilities, got "
            f"{shapes[0]} and {shapes[1]}"
        )
