"""Divergences of a student's distribution from a teacher's, and their derivatives.

Source: arXiv:2306.13649, section 3 (forward and reverse KL, generalized Jensen-Shannon).
"""

# Shape legend: C rows of a chunk, B buckets of a distribution.

import math
from dataclasses import dataclass
from typing import Literal, assert_never

import torch
from torch import Tensor

DivergenceKind = Literal["forward_kl", "reverse_kl", "jensen_shannon"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Divergence:
    """A divergence D(p, q) of teacher p and student q at a temperature, times its square."""

    # forward_kl: KL(p || q). reverse_kl: KL(q || p). jensen_shannon: beta KL(p || m) + (1 - beta) KL(q || m), with m =
    # beta p + (1 - beta) q.
    kind: DivergenceKind
    beta: float = 0.5  # weight of the teacher in m, above 0 and below 1; ignored by the others
    temperature: float = 1.0  # divisor of the logits of both


def divergence_terms(log_p_CB: Tensor, log_q_CB: Tensor, form: Divergence) -> tuple[Tensor, Tensor]:
    """Returns D(p, q) of each row, [C], and dD/du, [C, B], where q = softmax(u); ignores the temperature.

    `log_p_CB` and `log_q_CB` are log-probabilities of teacher and student. The teacher's may be minus infinity for
    forward_kl and jensen_shannon.
    """
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
            p_CB, beta = log_p_CB.exp(), form.beta
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
