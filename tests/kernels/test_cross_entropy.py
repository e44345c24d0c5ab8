"""Chunked cross-entropy and divergences from a teacher, and gradients, against autograd through whole logits.

Shape legend: N rows, D hidden size, S hidden size of the teacher, V vocabulary, K kept tokens.
"""

from itertools import product
from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import kernels.cross_entropy.reference as module
from kernels.cross_entropy import linear_distillation
from kernels.cross_entropy.reference import (
    IGNORE,
    Divergence,
    DivergenceKind,
    Teacher,
    TeacherStates,
    TeacherTopK,
    chunk_rows,
    linear_cross_entropy,
)
from tests.kernels.agreement_fused import (
    check_kept,
    check_wants,
    expected_of,
    some_slopes,
    some_targets,
)
from tests.kernels.plain import near, randn, strided

LARGE = 20_011

"""A vocabulary of which a few rows of logits fill a chunk."""

CASES = [(7, 5, 11), (1, 3, 2), (0, 4, 9), (129, 4, LARGE), (5, 1, 1)]


@pytest.mark.covering(2)
@pytest.mark.parametrize("has_slopes", [False, True])
@pytest.mark.parametrize("is_strided", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_log_probs_and_gradients_equal_formula(
    case: tuple[int, int, int], dtype: torch.dtype, is_strided: bool, has_slopes: bool
) -> None:
    num_rows, hidden, vocab = case
    rows, head = randn(num_rows, hidden, seed=0, dtype=dtype) * 2, randn(vocab, hidden, seed=1, dtype=dtype)
    targets = some_targets(num_rows, vocab)
    slopes = some_slopes(num_rows, dtype) if has_slopes else None
    log_probs, grad_rows, grad_head = expected_of(rows, head, targets, slopes)
    if is_strided:
        rows, head = strided(rows), head.t().contiguous().t()
    found = linear_cross_entropy(rows, head, targets, slopes, wants_rows=True, wants_head=True)
    assert found.log_probs_N.dtype == dtype
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found.log_probs_N.double(), log_probs, rtol=tolerance, atol=tolerance)
    assert found.rows_ND is not None
    assert found.head_VD is not None
    # Slopes come from sums over the vocabulary, then over it or over rows again: a narrow product may add a whole
    # vocabulary one after the other, with roundings that go as a random walk.
    near(found.rows_ND, grad_rows, 4, sums=max(64.0, 4 * vocab**0.5))
    near(found.head_VD, grad_head, 4, sums=64)
    ignored = found.rows_ND[targets == IGNORE]
    assert not ignored.any()
    assert not found.log_probs_N[targets == IGNORE].any()
    assert slopes is None or not found.rows_ND[slopes == 0].any()


def test_slopes_may_be_a_function_of_log_probabilities() -> None:
    """The slope of a policy gradient depends on the row's own log-probability and needs only one sweep."""
    rows, head, targets = randn(129, 4, seed=0), randn(LARGE, 4, seed=1), some_targets(129, LARGE)
    old_N, advantages_N = randn(129, seed=2) - 10, randn(129, seed=3)
    whole_N, _, _ = expected_of(rows, head, targets)

    def slopes(log_probs_C: torch.Tensor, chunk: slice) -> torch.Tensor:
        return (log_probs_C - old_N[chunk]).clamp(max=2).exp() * advantages_N[chunk]

    expected = expected_of(rows, head, targets, slopes(whole_N, slice(None)))
    found = linear_cross_entropy(rows, head, targets, slopes, wants_rows=True, wants_head=True)
    for made, wanted in zip((found.log_probs_N, found.rows_ND, found.head_VD), expected, strict=True):
        torch.testing.assert_close(made, wanted, rtol=1e-9, atol=1e-11)


def test_cross_entropy_is_computed_in_chunks_if_the_vocabulary_is_large() -> None:
    assert chunk_rows(200, LARGE, torch.float32) < 129
    assert chunk_rows(4, LARGE, torch.float32) == 4
    assert chunk_rows(0, LARGE, torch.float32) == 0


@pytest.mark.parametrize("has_slopes", [False, True])
@pytest.mark.parametrize("vocab", [11, LARGE])
def test_cross_entropy_in_bf16_is_as_near_as_its_logits_are(
    vocab: int, has_slopes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits and slopes are rounded to bf16 once; sums over targets, over rows and over chunks are not."""
    monkeypatch.setattr("kernels.cross_entropy.reference.CHUNK_LOGITS_16_BIT", 2**19)
    assert (chunk_rows(150, vocab, torch.bfloat16) < 150) == (vocab == LARGE)
    rows, head = randn(150, 8, seed=0, dtype=torch.bfloat16), randn(vocab, 8, seed=1, dtype=torch.bfloat16)
    targets = some_targets(150, vocab)
    slopes = some_slopes(150, torch.bfloat16) if has_slopes else None
    log_probs, grad_rows, grad_head = expected_of(rows, head, targets, slopes)
    found = linear_cross_entropy(rows, head, targets, slopes, wants_rows=True, wants_head=True)
    assert found.log_probs_N.dtype == torch.float32
    largest = float((rows.double() @ head.double().t()).abs().max())
    assert float((found.log_probs_N.double() - log_probs).abs().max()) <= largest * 2.0**-8
    assert found.rows_ND is not None
    assert found.head_VD is not None
    assert found.rows_ND.dtype == torch.bfloat16
    assert found.head_VD.dtype == torch.float32
    for made, expected in ((found.rows_ND, grad_rows), (found.head_VD, grad_head)):
        error = (made.double() - expected).norm() / expected.norm()
        assert float(error) < 0.02  # a logit's rounding, at most 2^-8 of about 8, moves its probability by 3 %


@pytest.mark.parametrize("num_rows", [0, 150])
def test_cross_entropy_makes_the_gradients_asked_for_alone(num_rows: int) -> None:
    check_wants(linear_cross_entropy, num_rows, LARGE)


def test_cross_entropy_is_finite_if_logits_are_large() -> None:
    rows, head = torch.tensor([[1e4], [-1e4]]), torch.tensor([[1.0], [-1.0], [0.5]])
    found = linear_cross_entropy(rows, head, torch.tensor([1, 1]), wants_rows=True, wants_head=True)
    assert found.log_probs_N.tolist() == [-2e4, 0]
    assert found.rows_ND is not None
    torch.testing.assert_close(found.rows_ND, torch.tensor([[2.0], [0.0]]))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_cross_entropy_among_kept_tokens_equals_formula(dtype: torch.dtype) -> None:
    for shape in ((33, 5, 300), (130, 3, LARGE), (0, 4, 9)):
        check_kept(module, "cpu", shape, dtype)


@pytest.mark.parametrize("target", [11, -1, -99])
def test_target_that_is_none_is_not_taken_for_another(target: int) -> None:
    rows_ND, head_VD = randn(3, 5, seed=0), randn(11, 5, seed=1)
    targets_N = torch.tensor([2, target, -100])
    with pytest.raises(RuntimeError, match=f"index {target} is out of bounds"):
        linear_cross_entropy(rows_ND, head_VD, targets_N, wants_rows=True, wants_head=True)


def test_operands_that_do_not_fit_are_named() -> None:
    rows_ND, head_VD, targets_N = randn(3, 5, seed=0), randn(11, 5, seed=1), torch.zeros(3, dtype=torch.int64)
    for given, rule in (
        ((rows_ND, head_VD[:, :4], targets_N), r"matrices of as many columns, got \[3, 5\] and \[11, 4\]"),
        ((rows_ND, head_VD, targets_N[:2]), r"targets must be torch.int64 \[3\], got torch.int64 \[2\]"),
        ((rows_ND, head_VD, targets_N.int()), r"targets must be torch.int64 \[3\], got torch.int32 \[3\]"),
        ((rows_ND, head_VD.float(), targets_N), "head must be torch.float64, as rows are, got torch.float32"),
        ((rows_ND, head_VD, targets_N.to("meta")), "must be on cpu, where rows are, got cpu and meta"),
    ):
        with pytest.raises(ValueError, match=rule):
            linear_cross_entropy(*given, wants_rows=True, wants_head=True)
    for kept_NK, found in (
        (torch.zeros(2, 4, dtype=torch.int64), r"torch.int64 \[2, 4\]"),
        (torch.zeros(3, 0, dtype=torch.int64), r"torch.int64 \[3, 0\]"),
        (torch.zeros(3, 4, dtype=torch.int32), r"torch.int32 \[3, 4\]"),
    ):
        with pytest.raises(ValueError, match=rf"kept_ids must be torch.int64 \[3, at least 1\] on cpu, got {found}"):
            linear_cross_entropy(rows_ND, head_VD, targets_N, wants_rows=True, wants_head=True, kept_ids_NK=kept_NK)
    for slopes_N, found in ((torch.ones(3), r"torch.float32 \[3\]"), (rows_ND[:2, 0], r"torch.float64 \[2\]")):
        with pytest.raises(ValueError, match=rf"row_slopes must be torch.float64 \[3\] on cpu, got {found} on cpu"):
            linear_cross_entropy(rows_ND, head_VD, targets_N, slopes_N, wants_rows=True, wants_head=True)


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


@pytest.mark.slow
@pytest.mark.covering(2)
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


def test_teacher_of_another_vocabulary_is_rejected() -> None:
    rows, head = randn(4, 5, seed=0), randn(13, 5, seed=1)
    targets, form = torch.zeros(4, dtype=torch.int64), Divergence(kind="forward_kl")
    for teacher in (
        TeacherStates(rows_NS=rows, head_VS=randn(12, 5, seed=1)),
        TeacherTopK(ids_NK=torch.zeros(3, 2, dtype=torch.int64), log_probs_NK=torch.zeros(3, 2)),
    ):
        with pytest.raises(ValueError, match="linear_distillation: the teacher"):
            linear_distillation(rows, head, targets, teacher, form, mix=(1.0, 0.0), wants_gradients=False)
