"""Routed experts against one row after the other in float64 under ordinary autograd, whoever brings the rows."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from comm.dispatch.expert_order import SortedChoices
from model.config import Recomputed
from model.feed_forward import RoutedExperts
from model.norm import NormSource
from model.precision.linear import WeightSink
from model.precision.linears import LocalRows
from model.precision.plain import PlainLinears, PlainRows
from tests.kernels.plain import expert_rows, randn, strided
from tests.model.against_plain import Weights, assert_equals_plain, randomize

SUBSETS: list[frozenset[Recomputed]] = [frozenset(), frozenset({"swiglu"})]
FROZEN: list[tuple[str, ...]] = [(), ("gate_up_proj",), ("down_proj",), ("gate_up_proj", "down_proj")]
COUNTS = [(3, 0, 4, 1), (0, 0, 6, 0), (0, 0, 0, 0), (1, 0, 0, 0)]


def make_experts(dtype: torch.dtype, recomputed: frozenset[Recomputed]) -> RoutedExperts:
    experts = RoutedExperts(6, 5, range(4, 8), dtype, PlainLinears(recomputed))
    randomize(experts, 1)
    return experts


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
