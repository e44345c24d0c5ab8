"""The gate against a plain reading of the paper, token by token."""

from dataclasses import replace

import pytest
import torch

from model.router import RouteError, Router
from tests.tiny import MODEL


def make_router(**changes: object) -> Router:
    config = replace(MODEL, **changes)  # type: ignore[arg-type]
    router = Router(config, torch.float64)
    generator = torch.Generator().manual_seed(1)
    torch.nn.init.normal_(router.weight, generator=generator)
    router.e_score_correction_bias.copy_(torch.randn(config.num_routed_experts, generator=generator) - 1.0)
    return router


@pytest.mark.parametrize(("groups", "limited"), [(4, 2), (2, 1), (1, 1), (4, 4), (8, 5), (4, 3)])
def test_router_equals_plain_reading(groups: int, limited: int) -> None:
    router = make_router(num_expert_groups=groups, num_limited_groups=limited)
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    routing = router(x)
    bias, size = router.e_score_correction_bias.double(), 8 // groups
    for token in range(18):
        scores = (x.view(18, 32)[token] @ router.weight.T).sigmoid().detach()
        biased = scores + bias
        totals = [sum(sorted(biased[g * size : (g + 1) * size].tolist())[-min(2, size) :]) for g in range(groups)]
        kept = sorted(range(groups), key=lambda g: -totals[g])[:limited]
        allowed = [expert for g in kept for expert in range(g * size, (g + 1) * size)]
        chosen = sorted(allowed, key=lambda expert: -float(biased[expert]))[:4]
        assert sorted(routing.ids_TK[token].tolist()) == sorted(chosen)
        expected = 2.5 * scores[routing.ids_TK[token]] / scores[chosen].sum()
        torch.testing.assert_close(routing.weights_TK[token], expected, rtol=1e-12, atol=0)


def test_router_weights_sum_to_the_scaling_factor() -> None:
    router = make_router()
    routing = router(torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64))
    torch.testing.assert_close(routing.weights_TK.sum(-1), torch.full((15,), 2.5, dtype=torch.float64))


def test_router_bias_moves_no_weight_and_gets_no_gradient() -> None:
    router = make_router(num_experts_per_token=8, num_expert_groups=1, num_limited_groups=1)
    x = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    first = router(x)
    router.e_score_correction_bias += torch.linspace(-3, 3, 8)
    second = router(x)
    order = torch.argsort(first.ids_TK), torch.argsort(second.ids_TK)
    in_order = first.weights_TK.gather(1, order[0]), second.weights_TK.gather(1, order[1])
    torch.testing.assert_close(*in_order, rtol=1e-14, atol=0)
    second.weights_TK.square().sum().backward()
    assert router.e_score_correction_bias.grad is None
    assert router.weight.grad is not None
    assert float(router.weight.grad.abs().max()) > 0


def test_router_load_counts_training_passes_only() -> None:
    router = make_router()
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    with torch.no_grad():
        router(x)
    assert int(router.load.sum()) == 0
    routing = router(x)
    assert torch.equal(router.load, torch.bincount(routing.ids_TK.flatten(), minlength=8))
    assert int(router.load.sum()) == 18 * 4


def test_bias_update_follows_the_sign_of_the_shortfall() -> None:
    router = make_router()
    router.e_score_correction_bias.zero_()
    router.update_bias(torch.tensor([5, 5, 0, 10, 5, 5, 9, 1]), 0.25)
    assert router.e_score_correction_bias.tolist() == [0, 0, 0.25, -0.25, 0, 0, -0.25, 0.25]


def test_balance_loss_is_one_per_sequence_at_perfect_balance() -> None:
    router = make_router()
    torch.nn.init.zeros_(router.weight)  # equal scores: P is uniform, so f's mean of 1 is the loss for every choice
    x = torch.randn(3, 10, 32, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    assert float(router(x).balance().detach()) == pytest.approx(3.0, rel=1e-12)


def test_balance_loss_equals_plain_reading() -> None:
    router = make_router()
    x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    expected = 0.0
    for sequence in x:
        scores = (sequence @ router.weight.T).sigmoid().detach()
        top = scores.topk(4).indices
        for expert in range(8):
            frequency = 8 / (4 * 7) * int((top == expert).sum())
            expected += frequency * float((scores[:, expert] / scores.sum(1)).mean())
    assert float(router(x).balance().detach()) == pytest.approx(expected, rel=1e-12)


def test_forced_ids_get_weights_from_their_own_scores() -> None:
    router = make_router()
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    logits = (x @ router.weight.T).detach().requires_grad_()
    forced = torch.stack([torch.randperm(8, generator=torch.Generator().manual_seed(token))[:4] for token in range(10)])
    routing = router.route(logits, forced)
    assert torch.equal(routing.ids_TK, forced)
    scores = logits.sigmoid().flatten(0, 1).gather(1, forced)
    torch.testing.assert_close(routing.weights_TK, 2.5 * scores / scores.sum(-1, keepdim=True), rtol=1e-12, atol=0)
    assert torch.equal(router.load, torch.bincount(forced.flatten(), minlength=8))
    # A gradient flows into the scores of the forced experts and into no others.
    (gradient,) = torch.autograd.grad(routing.weights_TK.square().sum(), logits)
    is_forced = torch.zeros(10, 8, dtype=torch.bool).scatter_(1, forced, value=True)
    assert torch.equal(gradient.flatten(0, 1) != 0, is_forced)


def test_forced_ids_of_the_router_itself_change_no_bit() -> None:
    router = make_router()
    logits = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    free = router.route(logits)
    forced = router.route(logits, free.ids_TK)
    assert torch.equal(forced.ids_TK, free.ids_TK)
    assert torch.equal(forced.weights_TK, free.weights_TK)


def test_router_chooses_for_tokens_without_forced_ids() -> None:
    router = make_router()
    logits = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(10), dtype=torch.float64)
    free = router.route(logits).ids_TK
    other = torch.stack([(row + 1) % 8 for row in free])
    is_free_T = torch.arange(10) % 3 == 0
    mixed = router.route(logits, torch.where(is_free_T[:, None], -1, other))
    assert torch.equal(mixed.ids_TK, torch.where(is_free_T[:, None], free, other))
    assert torch.equal(router.route(logits, torch.full_like(free, -1)).ids_TK, free)


@pytest.mark.parametrize(
    ("forced", "said"),
    [
        ([[0, 1, 2, 3], [4, 5, 6, 8]], r"different experts in 0 to 7, token 1 has \[4, 5, 6, 8\]"),
        ([[0, 1, 2, -1], [4, 5, 6, 7]], r"different experts in 0 to 7, token 0 has \[0, 1, 2, -1\]"),
        ([[0, 1, 2, 3], [4, 5, 6, 4]], r"different experts in 0 to 7, token 1 has \[4, 5, 6, 4\]"),
        ([[0, 1, 2, 3]], r"must be torch.int64 \[2, 4\], got torch.int64 \[1, 4\]"),
        ([[0.0, 1, 2, 3], [4, 5, 6, 7]], r"must be torch.int64 \[2, 4\], got torch.float32 \[2, 4\]"),
    ],
)
def test_invalid_forced_ids_are_rejected(forced: list[list[float]], said: str) -> None:
    with pytest.raises(RouteError, match=said):
        make_router().route(torch.zeros(1, 2, 8, dtype=torch.float64), torch.tensor(forced))
