"""Latent attention over ranks that share sequences, against the same attention on one rank."""

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from comm.config import ParallelismConfig
from comm.context.forecast import forecast_context_bytes
from comm.context.group import ContextExchange, open_context
from comm.context.protocol import ALONE, ContextGroup
from comm.dispatch.process_group import Observers
from comm.dispatch.traffic import Traffic
from comm.layout import Layout
from comm.watchdog.collective_log import CollectiveLog
from kernels.attention.documents import Documents
from model.attention.mla import LatentAttention, values_per_token
from model.config import Computing, ModelConfig, Recomputed
from model.gradients import GradientStore, WeightQueue
from model.norm import RmsNorm
from model.transformer import build_linears
from tests.context_parts import join_held, take_held
from tests.kernels.plain import randn
from tests.model.against_plain import assert_near, randomize
from tests.ranks import run_ranks
from tests.tiny import MODEL

SMALL = replace(MODEL, hidden_size=10, num_heads=3, norm_eps=1e-3)
WHOLE_QUERIES = replace(SMALL, q_lora_rank=None, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=16)
IN_FP8 = replace(MODEL, hidden_size=160, num_heads=3, q_lora_rank=136, kv_lora_rank=48, v_head_dim=20)
FP8 = Computing(products="fp8")
TOKENS = 24
# Documents end inside segments, at their borders, and cover several of them; the second sequence ends with padding.
PLACES = [[*range(5), *range(3), *range(12), *range(4)], [*range(1), *range(20), -1, -1, -1]]
SUBSETS: tuple[frozenset[Recomputed], ...] = (
    frozenset(),
    frozenset({"norm"}),
    frozenset({"mla_up"}),
    frozenset({"norm", "mla_up"}),
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way of computing attention."""

    config: ModelConfig = SMALL
    computing: Computing = Computing()  # noqa: RUF009  frozen
    dtype: torch.dtype = torch.float64
    is_packed: bool = False
    is_split: bool = False


CASES = [
    Case(computing=Computing(recomputed=recomputed), is_packed=is_packed, is_split=is_split)
    for recomputed, is_packed, is_split in product(SUBSETS, (False, True), (False, True))
] + [Case(config=WHOLE_QUERIES, is_packed=is_packed, is_split=True) for is_packed in (False, True)]
NARROW_CASES = [
    Case(dtype=torch.bfloat16, is_packed=True),
    Case(config=IN_FP8, computing=FP8, dtype=torch.float32, is_packed=True, is_split=True),
    Case(config=IN_FP8, computing=FP8, dtype=torch.bfloat16),
    Case(config=replace(IN_FP8, q_lora_rank=None), computing=FP8, dtype=torch.float32),
]


class _Module(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        config, computing = case.config, case.computing
        self.norm = RmsNorm(config.hidden_size, config.norm_eps, case.dtype)
        linears = build_linears(computing)
        self.self_attn = LatentAttention(config, case.dtype, computing.attention, linears)
        randomize(self, 1, 0.4 if config.hidden_size < 100 else 0.1)


def attend(case: Case, context: ContextGroup, *, is_exact: bool = False) -> dict[str, Tensor]:
    """Returns the output, and the gradients of the input and of every weight.

    Args:
        case: the way of computing.
        context: ranks that share sequences.
        is_exact: computes in float64 from the case's weights and inputs.
    """
    module = _Module(case)
    if is_exact:
        given = module.state_dict()
        module = _Module(replace(case, computing=Computing(), dtype=torch.float64))
        module.load_state_dict(given)
    documents = Documents.from_positions(torch.tensor(PLACES)) if case.is_packed else None
    width = case.config.hidden_size
    x, slope = (randn(2, TOKENS, width, seed=seed, dtype=case.dtype) for seed in (2, 3))
    if is_exact:
        x, slope = x.double(), slope.double()
    x = take_held(x, context.index, context.size).clone().requires_grad_()
    queue, weights = WeightQueue(), dict(module.named_parameters())
    out = module.self_attn(x, module.norm, queue if case.is_split else None, documents, context)
    with torch.no_grad():
        again = module.self_attn(x, module.norm, None, documents, context)
        assert torch.equal(out, again), "without a backward"
    out.backward(take_held(slope, context.index, context.size))
    store = GradientStore(weights.values())
    queue.flush(store)
    assert x.grad is not None
    found = {"output": out.detach(), "x": x.grad}
    for name, weight in weights.items():
        found[name] = store.gradient(weight) if weight.grad is None else weight.grad
    return found


def _attend_all(rank: int, world_size: int, cases: list[Case], exchange: ContextExchange) -> list[Any]:
    observers = Observers(Traffic(), CollectiveLog())
    layout = Layout(ParallelismConfig(pipeline=1, data=world_size, expert=1), ranks_per_node=2)
    group = open_context(distributed.group.WORLD, layout, observers, exchange)
    found: list[Any] = []
    for case in cases:
        made = attend(case, group)
        snapshot = observers.traffic.take()
        found.append((made, snapshot.num_bytes_within_node + snapshot.num_bytes_across_nodes))
    return found


def joined(parts: list[dict[str, Tensor]], name: str) -> Tensor:
    """Returns the tokens of all ranks in order, or the sum of the ranks' gradients."""
    tensors = [part[name] for part in parts]
    if name in ("output", "x"):
        return join_held(tensors)
    return torch.stack([each.double() for each in tensors]).sum(0)


@pytest.mark.parametrize(
    "size", [pytest.param(1, marks=pytest.mark.long), 2, pytest.param(3, marks=pytest.mark.long), 4]
)
@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_attention_of_all_ranks_equals_that_of_one(exchange: ContextExchange, size: int) -> None:
    cases = CASES[::5] if size < 4 else CASES[::3] if exchange == "ring" else CASES
    results = run_ranks(size, _attend_all, cases, exchange)
    for place, case in enumerate(cases):
        expected, parts = attend(case, ALONE), [result[place][0] for result in results]
        assert expected.keys() == parts[0].keys()
        for name, exact in expected.items():
            assert_near(joined(parts, name), exact, 1e-10, f"{name}, {exchange}, {size} ranks, {case}")


@pytest.mark.parametrize(("exchange", "size"), [("gather", 4), pytest.param("ring", 2, marks=pytest.mark.long)])
def test_attention_in_narrow_types_is_as_near_to_the_exact_as_on_one_rank(exchange: ContextExchange, size: int) -> None:
    """Errors are of the same size but differ: each rank rounds its part of a gradient with scales of this part."""
    results = run_ranks(size, _attend_all, NARROW_CASES, exchange)
    for place, case in enumerate(NARROW_CASES):
        exact, alone = attend(case, ALONE, is_exact=True), attend(case, ALONE)
        for name, right in exact.items():
            made = joined([result[place][0] for result in results], name)
            error, usual = float((made - right).norm()), float((alone[name] - right).norm())
            assert error <= 1.5 * usual, f"{name}, {exchange}, {case}: {error}, on one rank {usual}, of {right.norm()}"


@pytest.mark.parametrize(("exchange", "size"), [("gather", 4), ("ring", 2)])
def test_bytes_of_attention_are_the_values_of_every_token(exchange: ContextExchange, size: int) -> None:
    """A layer sends a latent and a rotated key per token in each direction, 576 values for DeepSeek-V3.

    In FP8 they are sent as they are kept. Gradients have the model's type; those in a ring are sums in float32.
    """
    cases = [Case(), Case(dtype=torch.bfloat16), Case(config=IN_FP8, computing=FP8, dtype=torch.bfloat16)]
    results = run_ranks(size, _attend_all, cases, exchange)
    for place, case in enumerate(cases):
        value, num_values = case.dtype.itemsize, values_per_token(case.config)
        row_bytes = num_values * value
        if case.computing.products == "fp8":
            # Codes of the latents with a scale for every 128, the norm's scale, and the shared key.
            rank = case.config.kv_lora_rank
            row_bytes = rank + 4 * -(-rank // 128) + 4 + case.config.qk_rope_head_dim * value
        predicted = forecast_context_bytes(
            size=size,
            num_tokens=2 * TOKENS,
            row_bytes=row_bytes,
            gradient_bytes=num_values * value,
            wide_gradient_bytes=num_values * max(4, value),
            is_ring=exchange == "ring",
        )
        # `attend` runs the forward twice, once without a backward.
        sent = [result[place][1] for result in results]
        assert sent == [2 * predicted.forward + predicted.backward] * size, f"case {place}"
