"""Divergences from a teacher and their gradients against autograd through whole logits in float64.

Shape legend: N rows, D hidden size, S hidden size of the teacher, V vocabulary, K kept tokens.
"""

from itertools import pairwise, product
from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from kernels.distillation import linear_distillation
from kernels.distillation.reference import Divergence, DivergenceKind, Teacher, TeacherStates, TeacherTopK
from tests.kernels.agreement_fused import some_targets
from tests.kernels.plain import randn

LARGE = 20_011
"""A vocabulary of which a few rows of logits fill a chunk."""
FORMS = [
    Divergence(kind=kind, beta=beta, temperature=temperature)
    for kind, beta, temperature in product(get_args(DivergenceKind), (0.1, 0.5), (1.0, 2.5))
    if kind == "jensen_shannon" or beta == 0.5
]


def plain_divergence(log_p_NV: Tensor, log_q_NV: Tensor, form: Divergence) -> Tensor:
    """Returns tau^2 D of each row by torch's own KL."""

    def kl(log_left: Tensor, log_right: Tensor) -> Tensor:
        return functional.kl_div(log_right, log_left, reduction="none", log_target=True).sum(-1)

    match form.kind:
        case "forward_kl":
            found = kl(log_p_NV, log_q_NV)
        case "reverse_kl":
            found = kl(log_q_NV, log_p_NV)
        case "jensen_shannon":
            log_m_NV = (form.beta * log_p_NV.exp() + (1 - form.beta) * log_q_NV.exp()).log()
            found = form.beta * kl(log_p_NV, log_m_NV) + (1 - form.beta) * kl(log_q_NV, log_m_NV)
    return form.temperature**2 * found


def buckets(logs_NV: Tensor, ids_NK: Tensor) -> Tensor:
    """Returns the log-probabilities of kept tokens, then of all others together."""
    kept_NK = logs_NV.gather(1, ids_NK)
    others_NV = torch.ones_like(logs_NV, dtype=torch.bool).scatter_(1, ids_NK, value=False)
    rest_N = logs_NV.masked_fill(~others_NV, -torch.inf).logsumexp(-1)
    return torch.cat((kept_NK, rest_N[:, None]), -1)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("vocab", [11, LARGE])
@pytest.mark.parametrize("kept", [0, 4])
def test_divergence_and_gradients_equal_autograd_through_whole_logits(form: Divergence, vocab: int, kept: int) -> None:
    """`kept`: 0 for a teacher as states, else for its most probable tokens and the rest."""
    num_rows = 70 if vocab == LARGE else 129
    rows, head = randn(num_rows, 5, seed=0) * 2, randn(vocab, 5, seed=1)
    teacher_rows, teacher_head = randn(num_rows, 3, seed=2), randn(vocab, 3, seed=3)
    targets, weights, mix = some_targets(num_rows, vocab), randn(num_rows, seed=4).abs(), (0.7, 0.3)
    leaves = [rows.clone().requires_grad_(), head.clone().requires_grad_()]
    logits = leaves[0] @ leaves[1].t()
    log_p = (teacher_rows @ teacher_head.t() / form.temperature).log_softmax(-1)
    log_q = (logits / form.temperature).log_softmax(-1)
    teacher: Teacher = TeacherStates(rows_NS=teacher_rows, head_VS=teacher_head)
    if kept:
        top = log_p.topk(kept)
        teacher = TeacherTopK(ids_NK=top.indices, log_probs_NK=top.values)
        log_p, log_q = buckets(log_p, top.indices), buckets(log_q, top.indices)
    divergences = plain_divergence(log_p, log_q, form).masked_fill(targets == -100, 0)
    nats = functional.cross_entropy(logits, targets, reduction="none")
    (weights * (mix[0] * divergences + mix[1] * nats)).sum().backward()
    found = linear_distillation(
        rows, head, targets, teacher, form, mix=mix, row_weights_N=weights, wants_gradients=True
    )
    torch.testing.assert_close(found.divergences_N, divergences.detach(), rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(found.scores.log_probs_N, -nats.detach(), rtol=1e-10, atol=1e-11)
    for made, leaf in zip((found.scores.rows_ND, found.scores.head_VD), leaves, strict=True):
        assert made is not None
        assert leaf.grad is not None
        assert (made - leaf.grad).abs().max() <= 1e-10 * leaf.grad.abs().max()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_all_tokens_and_the_rest_are_the_whole_divergence(form: Divergence) -> None:
    rows, head, vocab = randn(40, 5, seed=0), randn(13, 5, seed=1), 13
    teacher_rows, teacher_head = randn(40, 3, seed=2), randn(vocab, 3, seed=3)
    whole = TeacherStates(rows_NS=teacher_rows, head_VS=teacher_head)
    top = (teacher_rows @ teacher_head.t() / form.temperature).log_softmax(-1).topk(vocab)
    listed = TeacherTopK(ids_NK=top.indices, log_probs_NK=top.values)
    targets = some_targets(40, vocab)
    one, other = (
        linear_distillation(rows, head, targets, teacher, form, mix=(1.0, 0.0), wants_gradients=True)
        for teacher in (whole, listed)
    )
    torch.testing.assert_close(one.divergences_N, other.divergences_N, rtol=1e-10, atol=1e-12)
    assert one.scores.rows_ND is not None
    assert other.scores.rows_ND is not None
    torch.testing.assert_close(one.scores.rows_ND, other.scores.rows_ND, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("kept", [0, 4, 13])
def test_student_equal_to_its_teacher_has_divergence_and_gradient_zero(form: Divergence, kept: int) -> None:
    rows, head = randn(40, 5, seed=0), randn(13, 5, seed=1)
    teacher: Teacher = TeacherStates(rows_NS=rows, head_VS=head)
    if kept:
        top = (rows @ head.t() / form.temperature).log_softmax(-1).topk(kept)
        teacher = TeacherTopK(ids_NK=top.indices, log_probs_NK=top.values)
    found = linear_distillation(rows, head, some_targets(40, 13), teacher, form, mix=(1.0, 0.0), wants_gradients=True)
    for tensor in (found.divergences_N, found.scores.rows_ND, found.scores.head_VD):
        assert tensor is not None
        assert tensor.abs().max() <= 1e-13


def test_divergence_is_at_least_zero_and_that_of_lists_at_most_the_whole() -> None:
    """Tokens that are one bucket never distinguish two distributions better than separate tokens do."""
    rows, head, teacher_rows = randn(60, 5, seed=0), randn(50, 5, seed=1), randn(60, 5, seed=2)
    targets, form = torch.zeros(60, dtype=torch.int64), Divergence(kind="forward_kl")
    top = (teacher_rows @ head.t()).log_softmax(-1)
    values = [
        linear_distillation(
            rows,
            head,
            targets,
            TeacherTopK(ids_NK=top.topk(kept).indices, log_probs_NK=top.topk(kept).values),
            form,
            mix=(1.0, 0.0),
            wants_gradients=False,
        ).divergences_N
        for kept in (1, 4, 20, 49, 50)
    ]
    assert (values[0] >= 0).all()
    for fewer, more in pairwise(values):
        assert (more - fewer).min() >= -1e-12


def test_teacher_of_another_vocabulary_is_rejected() -> None:
    rows, head = randn(4, 5, seed=0), randn(13, 5, seed=1)
    targets, form = torch.zeros(4, dtype=torch.int64), Divergence(kind="forward_kl")
    for teacher in (
        TeacherStates(rows_NS=rows, head_VS=randn(12, 5, seed=1)),
        TeacherTopK(ids_NK=torch.zeros(3, 2, dtype=torch.int64), log_probs_NK=torch.zeros(3, 2)),
    ):
        with pytest.raises(ValueError, match="linear_distillation: the teacher"):
            linear_distillation(rows, head, targets, teacher, form, mix=(1.0, 0.0), wants_gradients=False)
