"""The gate against a plain reading of the paper, token by token, and routed experts against one row after the other."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from comm.dispatch.local import SortedChoices
from comm.protocol import Contribution, Rows, SequenceParts, Work, zigzag_parts
from kernels.attention.documents import Documents
from kernels.router_scores import ROUTERS
from model.block import RoutedExperts
from model.config import BalanceOver, Recomputed
from model.linear import WeightSink
from model.norm import NormSource
from model.precision.linears import LocalRows
from model.precision.plain import PlainLinears, PlainRows
from model.router import RouteError, Router
from tests.context_parts import join_held, take_held
from tests.kernels.plain import expert_rows, randn, strided
from tests.model.against_plain import Weights, assert_equals_plain, randomize
from tests.tiny import MODEL


def make_router(**changes: Any) -> Router:
    config = replace(MODEL, **changes)
    router = Router(config, torch.float64)
    generator = torch.Generator().manual_seed(1)
    torch.nn.init.normal_(router.weight, generator=generator)
    router.e_score_correction_bias.copy_(torch.randn(config.num_routed_experts, generator=generator) - 1.0)
    return router


@pytest.mark.parametrize(
    ("groups", "limited", "given", "num_scores"),
    [(4, 2, None, 2), (1, 1, None, 4), (8, 5, None, 1), (2, 1, None, 4), (2, 1, 2, 2), (4, 3, None, 1), (4, 3, 2, 2)],
)
@pytest.mark.parametrize("kind", ROUTERS.names())
def test_router_equals_plain_reading(groups: int, limited: int, given: int | None, num_scores: int, kind: str) -> None:
    """A group's score adds 4 / M of its biased scores, unless the configuration has another number."""
    limits = {"num_expert_groups": groups, "num_limited_groups": limited, "group_score_experts": given}
    router = make_router(**limits, router=kind)
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    routing = router(x)
    bias, size = router.e_score_correction_bias.double(), 8 // groups
    for token in range(18):
        scores = ROUTERS.get(kind).scores(x.view(18, 32)[token] @ router.weight.T).detach()
        biased = scores + bias
        totals = [sum(sorted(biased[g * size : (g + 1) * size].tolist())[-num_scores:]) for g in range(groups)]
        kept = sorted(range(groups), key=lambda g: -totals[g])[:limited]
        allowed = [expert for g in kept for expert in range(g * size, (g + 1) * size)]
        chosen = sorted(allowed, key=lambda expert: -float(biased[expert]))[:4]
        assert sorted(routing.ids_TK[token].tolist()) == sorted(chosen)
        expected = 2.5 * scores[routing.ids_TK[token]] / scores[chosen].sum()
        torch.testing.assert_close(routing.weights_TK[token], expected, rtol=1e-12, atol=0)


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


@pytest.mark.parametrize("over", get_args(BalanceOver))
def test_balance_loss_equals_plain_reading(over: BalanceOver) -> None:
    router = make_router()
    x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    expected = 0.0
    # Over a micro-batch, all tokens are one sequence that counts for two.
    for sequence in x if over == "sequence" else [x.flatten(0, 1)] * 2:
        scores = (sequence @ router.weight.T).sigmoid().detach()
        top = scores.topk(4).indices
        for expert in range(8):
            frequency = 8 / (4 * len(sequence)) * int((top == expert).sum())
            expected += frequency * float((scores[:, expert] / scores.sum(1)).mean())
    assert float(router(x).balance(over=over).detach()) == pytest.approx(expected, rel=1e-12)


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


@dataclass(frozen=True, slots=True)
class RecordedContext:
    """One of several ranks that share sequences. The sum over the group is known from a first pass."""

    size: int
    index: int
    given: list[Tensor]
    total: Tensor | None = None
    keeps_rows = True

    def parts(self, own_tokens: int) -> SequenceParts:
        """Returns the zig-zag parts."""
        return zigzag_parts(own_tokens * self.size, self.size)

    def visit(self, rows: Rows) -> Iterator[tuple[int, Rows]]:
        """Is not called by the router."""
        raise AssertionError

    def collect(self, rows: Rows, kept: Mapping[int, Rows], contribute: Contribution) -> Work[Tensor]:
        """Is not called by the router."""
        raise AssertionError

    def sum(self, values: Tensor) -> Tensor:
        """Records this rank's part, and returns the known sum."""
        self.given.append(values)
        return values if self.total is None else self.total


@pytest.mark.parametrize("over", get_args(BalanceOver))
@pytest.mark.parametrize(("size", "masked"), [(2, False), (4, True)])
def test_balance_loss_of_ranks_that_share_sequences_adds_up_to_the_whole(
    size: int, masked: bool, over: BalanceOver
) -> None:
    router, x = make_router(), randn(2, 16, 32, seed=4)
    # Uneven documents across the parts of ranks, and padding at the end of each sequence.
    lengths = ((5, 7, 1), (3, 9))
    positions = torch.full((2, 16), -1)
    for sequence, documents in enumerate(lengths):
        start = 0
        for length in documents:
            positions[sequence, start : start + length] = torch.arange(length)
            start += length
    documents = Documents.from_positions(positions) if masked else None  # type: ignore[assignment]
    whole = x.clone().requires_grad_()
    expected = router(whole).balance(documents, over=over)
    expected.backward()

    def part(index: int, parts: list[Tensor], total: Tensor | None) -> tuple[Tensor, Tensor]:
        own = take_held(x, index, size).clone().requires_grad_()
        found = router(own).balance(documents, RecordedContext(size, index, parts, total), over)
        found.backward()
        assert own.grad is not None
        return found.detach(), own.grad

    parts: list[Tensor] = []
    for index in range(size):
        part(index, parts, None)
    total = torch.stack(parts).sum(0)
    found = [part(index, [], total) for index in range(size)]
    torch.testing.assert_close(torch.stack([loss for loss, _ in found]).sum(), expected.detach(), rtol=1e-13, atol=0)
    assert whole.grad is not None
    gradient = join_held([gradient for _, gradient in found])
    torch.testing.assert_close(gradient, whole.grad, rtol=1e-12, atol=1e-16)


SUBSETS: list[frozenset[Recomputed]] = [frozenset(), frozenset({"swiglu"})]
FROZEN: list[tuple[str, ...]] = [(), ("gate_up_proj",), ("down_proj",), ("gate_up_proj", "down_proj")]
COUNTS = [(3, 0, 4, 1), (0, 0, 6, 0), (0, 0, 0, 0), (1, 0, 0, 0)]


def make_experts(dtype: torch.dtype, recomputed: frozenset[Recomputed]) -> RoutedExperts:
    experts = RoutedExperts(6, 5, range(4, 8), dtype, PlainLinears(recomputed))
    randomize(experts, 1)
    return experts


@pytest.mark.covering(2)
@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("is_split", [False, True])
@pytest.mark.parametrize("recomputed", SUBSETS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_experts_of_arrived_rows_equal_row_by_row(
    dtype: torch.dtype, recomputed: frozenset[Recomputed], is_split: bool, frozen: tuple[str, ...]
) -> None:
    experts = make_experts(dtype, recomputed)
    for counts in COUNTS:

        def call(
            experts: RoutedExperts, inputs: Sequence[Tensor], sink: WeightSink | None, counts: tuple[int, ...] = counts
        ) -> tuple[Tensor]:
            return (experts(PlainRows(inputs[0]), inputs[1], counts, sink),)

        def plainly(weights: Weights, inputs: Sequence[Tensor], counts: tuple[int, ...] = counts) -> tuple[Tensor]:
            rows_AD = expert_rows(inputs[0], inputs[1], weights["gate_up_proj"], weights["down_proj"], counts)
            # Where no row came, gradients are zeros and not missing.
            return (rows_AD + sum(each.sum() * 0 for each in (*inputs, *weights.values())),)

        rows, routed = randn(sum(counts), 6, seed=2, dtype=dtype), randn(sum(counts), seed=3, dtype=dtype)
        for given in (rows, strided(rows)):
            assert_equals_plain(experts, call, plainly, [given, routed], is_split=is_split, frozen=frozen)


@pytest.mark.covering(2)
@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("recomputed", SUBSETS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("choices", ["spread", "one expert", "no token"])
def test_local_experts_equal_row_by_row(
    choices: str, dtype: torch.dtype, recomputed: frozenset[Recomputed], frozen: tuple[str, ...]
) -> None:
    experts, num_tokens = make_experts(dtype, recomputed), 0 if choices == "no token" else 7
    generator = torch.Generator().manual_seed(4)
    ids_TK = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(7)])[:num_tokens]
    if choices == "one expert":
        ids_TK = torch.full((7, 1), 2)
    order = SortedChoices.sort(ids_TK).keep(0)
    counts = tuple(torch.bincount(ids_TK.flatten(), minlength=4).tolist())

    def call(experts: RoutedExperts, inputs: Sequence[Tensor], sink: WeightSink | None) -> tuple[Tensor]:
        source = NormSource(inputs[0], torch.ones(6), 1e-6)  # rows in the weights' type are kept, not made again
        return (experts(PlainRows(inputs[0]), inputs[1], counts, None, LocalRows(source, order)),)

    def plainly(weights: Weights, inputs: Sequence[Tensor]) -> tuple[Tensor]:
        rows_ND, weights_TK = inputs
        total_ND = rows_ND * 0 + weights_TK.sum() * 0 + sum(each.sum() * 0 for each in weights.values())
        for expert in range(4):
            tokens, places = (ids_TK == expert).nonzero().unbind(1)
            made = expert_rows(
                rows_ND[tokens],
                weights_TK[tokens, places],
                weights["gate_up_proj"][expert, None],
                weights["down_proj"][expert, None],
                (len(tokens),),
            )
            total_ND = total_ND.index_add(0, tokens, made)
        return (total_ND,)

    rows, routed = randn(num_tokens, 6, seed=2, dtype=dtype), randn(*ids_TK.shape, seed=3, dtype=dtype)
    assert_equals_plain(experts, call, plainly, [rows, routed], is_split=False, frozen=frozen)


def test_experts_keep_routing_weights_gradient_in_their_own_type() -> None:
    experts = make_experts(torch.bfloat16, frozenset())
    rows, weights = randn(3, 6, seed=0, dtype=torch.bfloat16), randn(3, seed=1, dtype=torch.float32).requires_grad_()
    experts(PlainRows(rows), weights, (1, 0, 2, 0), None).sum().backward()
    assert weights.grad is not None
    assert weights.grad.dtype == torch.float32


def test_experts_have_views_under_released_names() -> None:
    experts = make_experts(torch.float32, frozenset())
    named = dict(experts.per_expert())
    assert list(named) == [f"{e}.{part}_proj.weight" for e in range(4, 8) for part in ("gate", "up", "down")]
    assert torch.equal(named["5.up_proj.weight"], experts.gate_up_proj[1, 5:])
    assert isinstance(experts.down_proj, nn.Parameter)
    assert named["7.down_proj.weight"].data_ptr() == experts.down_proj[3].data_ptr()
