"""Divergence of a linear head's distribution from a teacher's, chunk by chunk, with its gradients."""

# Shape legend: N rows, C rows of a chunk, B buckets of a distribution, D hidden size, V vocabulary, S hidden size of
# the teacher, K kept tokens of the teacher.

import math
from dataclasses import dataclass
from typing import Literal, assert_never

import torch
from torch import Tensor

from kernels.cross_entropy.reference import IGNORE, RowScores, add_gradients, check_operands, chunk_rows, empty_scores

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
        logits_CV = (rows_ND[chunk] @ head_VD.t()).to(wide)
        logs_CV = torch.log_softmax(logits_CV, -1)
        scores.log_probs_N[chunk] = logs_CV.gather(1, places_C1)[:, 0].masked_fill_(is_ignored_C, 0)
        scaled_CV = logs_CV if form.temperature == 1.0 else torch.log_softmax(logits_CV / form.temperature, -1)
        del logits_CV
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
    ids_CK = teacher.ids_NK[chunk]
    log_p_CK = teacher.log_probs_NK[chunk].to(logs_CV.dtype)
    log_q_CK = logs_CV.gather(1, ids_CK)
    if ids_CK.shape[1] == logs_CV.shape[1]:
        values_C, slopes_CK = divergence_terms(log_p_CK, log_q_CK, form)
        return values_C, torch.empty_like(logs_CV).scatter_(1, ids_CK, slopes_CK)
    log_p_CB, log_q_CB = (torch.cat((each, _log_rest(each)), -1) for each in (log_p_CK, log_q_CK))
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
