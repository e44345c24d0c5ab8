"""The router's kernels: interpreted, the reference's choices bit for bit; and laws of the reference.

Shape legend: T tokens in all, K choices per token, E experts.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import kernels.router.reference as reference
import kernels.router.triton as kernels
from kernels.router.reference import RouteLimits, limit_groups, route, top_ids
from kernels.router_scores import ROUTERS
from tests.kernels.interpreter_casts import interpreted
from tests.kernels.plain import near, randn

LIMITS = [
    (RouteLimits(8, 8, 4, 2.5, 2), 256),
    (RouteLimits(6, 8, 3, 16.0, 5), 160),
    (RouteLimits(2, 3, 2, 1.0, 1), 12),
    (RouteLimits(3, 6, 4, 1.0, 2), 6),
    (RouteLimits(1, 1, 1, 1.0, 1), 5),
    (RouteLimits(4, 4, 4, 1.5, 1), 4),
]

PLAIN_SCORES = {
    "sigmoid": lambda logits_TE: 1 / (1 + (-logits_TE).exp()),
    "softmax": lambda logits_TE: logits_TE.exp() / logits_TE.exp().sum(-1, keepdim=True),
}
"""Scores by their formulas; a plugin's own are differentiated."""


def inputs(num_experts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns logits and a bias: rows of random numbers, of few different ones, of equal ones, and saturated ones."""
    logits_TE = randn(13, num_experts, seed=num_experts, dtype=dtype) * 3
    logits_TE[4:8].round_()
    logits_TE[8] = 0.25
    logits_TE[9] = logits_TE[9].sign() * 120
    logits_TE[10:12] += 40
    return logits_TE, (randn(num_experts, seed=1) * 4).round() / 4 - 0.5


@pytest.mark.slow
@interpreted
def test_interpreted_router_equals_the_reference() -> None:
    dtype = torch.float32
    for limits, num_experts in LIMITS:
        logits_TE, bias_E = inputs(num_experts, dtype)
        loads = [torch.arange(num_experts) for _ in range(2)]
        expected = reference.route(logits_TE, bias_E, limits, loads[0])
        actual = kernels.route(logits_TE, bias_E, limits, loads[1])
        # Choices, their order, scores and counts to the bit; weights to the order of the sum.
        assert torch.equal(actual.ids_TK, expected.ids_TK)
        assert torch.equal(actual.scores_TE, expected.scores_TE)
        assert torch.equal(*loads)
        near(actual.weights_TK, expected.weights_TK.double(), 2)
        forced_TK = expected.ids_TK.flip(0)
        again = kernels.route(logits_TE, bias_E, limits, None, forced_TK)
        assert again.ids_TK is forced_TK
        near(again.weights_TK, reference.route(logits_TE, bias_E, limits, None, forced_TK).weights_TK.double(), 2)
        grad_TK, grad_TE = (
            randn(*expected.ids_TK.shape, seed=2, dtype=dtype),
            randn(*logits_TE.shape, seed=3, dtype=dtype),
        )
        for grad_scores in (None, grad_TE):
            made = kernels.route_backward(grad_TK, *expected, grad_scores, limits)
            near(made, reference.route_backward(grad_TK, *expected, grad_scores, limits).double(), 8)
    nothing = kernels.route(logits_TE[:0], bias_E, limits)
    assert kernels.route_backward(nothing.weights_TK, *nothing, None, limits).shape == (0, num_experts)
    # A NaN takes no place twice.
    logits_TE.fill_(torch.nan)
    assert (kernels.route(logits_TE, bias_E, limits).ids_TK.sort().values.diff() > 0).all()


@pytest.mark.parametrize("kind", ROUTERS.names())
def test_gradient_of_logits_is_that_of_the_plain_computation(kind: str) -> None:
    for limits, num_experts in ((replace(limits, kind=kind), num_experts) for limits, num_experts in LIMITS):
        logits_TE, bias_E = inputs(num_experts, torch.float64)
        logits_TE.requires_grad_()
        chosen = route(logits_TE.detach(), bias_E, limits)
        grad_TK, grad_TE = randn(*chosen.ids_TK.shape, seed=2), randn(*logits_TE.shape, seed=3)
        scores_TE = PLAIN_SCORES.get(kind, ROUTERS.get(kind).scores)(logits_TE)
        chosen_TK = scores_TE.gather(1, chosen.ids_TK)
        weights_TK = limits.factor * chosen_TK / (chosen_TK.sum(1, keepdim=True) + 1e-20)
        torch.testing.assert_close(chosen.weights_TK, weights_TK, rtol=1e-14, atol=0)
        loss = (weights_TK * grad_TK).sum() + (scores_TE * grad_TE).sum()
        (expected,) = torch.autograd.grad(loss, logits_TE)
        actual = reference.route_backward(grad_TK.double(), *chosen, grad_TE.double(), limits)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("count", [1, 3, 8])
def test_top_ids_prefer_the_lower_of_equal_scores(count: int) -> None:
    scores_TE = torch.randint(0, 3, (50, 8), generator=torch.Generator().manual_seed(0)).float()
    expected = [sorted(range(8), key=lambda expert: (-row[expert], expert))[:count] for row in scores_TE.tolist()]
    assert top_ids(scores_TE, count).tolist() == expected
    assert limit_groups(torch.ones(1, 8), 4, 2, 2).tolist() == [[True] * 4 + [False] * 4]
    forced = route(scores_TE, torch.zeros(8), RouteLimits(count, 1, 1, 1.0, 2), None, top_ids(scores_TE, count))
    assert torch.equal(forced.weights_TK, route(scores_TE, torch.zeros(8), replace(LIMITS[4][0], num_chosen=count))[1])
