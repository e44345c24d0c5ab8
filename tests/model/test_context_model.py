"""Attention and the whole model over ranks that share sequences: outputs, loss, gradients and what they keep."""

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from comm.config import ParallelismConfig
from comm.context_group import ContextExchange, open_context
from comm.dispatch.local import LocalDispatcher
from comm.dispatch.process_group import Observers
from comm.dispatch.traffic import Traffic
from comm.layout import Layout, forecast_context_bytes, num_kept_ranks
from comm.protocol import ALONE, ContextGroup, sliced_parts
from comm.watchdog.collective_log import CollectiveLog
from kernels.attention.documents import Documents
from launch.config.run import compose_run
from model.attention.mla import LatentAttention
from model.config import RECOMPUTED, Computing, MlaConfig, Products, Recomputed
from model.linear import GradientStore, WeightQueue
from model.norm import RmsNorm
from model.objective import LossSums, MicroBatch, loss_names
from model.slices import SlicedSequences
from model.transformer import Transformer, build_linears, initialize_weights
from tests.context_parts import join_held, take_held
from tests.kernels.plain import randn
from tests.model.against_plain import assert_near, randomize
from tests.model.live_memory import counted_bytes, kept_bytes
from tests.model.test_activations import WIDE as IN_FP8
from tests.model.test_stage import make_objective, phased
from tests.ranks import run_ranks
from tests.tiny import MODEL

TOKENS = 24
PLACES = [[*range(5), *range(3), *range(12), *range(4)], [*range(1), *range(20), -1, -1, -1]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model, its batch, and how its loss is computed."""

    config: MlaConfig = MODEL
    recomputed: frozenset[Recomputed] = frozenset(RECOMPUTED)
    products: Products = "own"
    dtype: torch.dtype = torch.float64
    tokens: int = TOKENS
    is_packed: bool = False
    is_phased: bool = False

    def batch(self, context: ContextGroup) -> MicroBatch:
        """Returns the tokens that a rank holds, with the documents of whole sequences."""
        depths, generator = range(self.config.mtp_depth + 1), torch.Generator().manual_seed(3)
        ids = torch.randint(self.config.vocab_size, (2, self.tokens + len(depths)), generator=generator)
        places = torch.tensor(PLACES) if self.is_packed else None

        def held(values: Tensor) -> Tensor:
            return take_held(values, context.index, context.size).contiguous()

        targets = [ids[:, depth + 1 : depth + 1 + self.tokens].clone() for depth in depths]
        if places is not None:
            for target in targets:
                target[places < 0] = -100
        return MicroBatch(
            inputs_BT=tuple(held(ids[:, depth : depth + self.tokens]) for depth in depths),
            targets_BT=tuple(held(target) for target in targets),
            documents=None if places is None else Documents.from_positions(places),
        )

    def model(self, context: ContextGroup) -> Transformer:
        """Returns the model with weights that depend on the case alone."""
        computing = Computing(recomputed=self.recomputed, products=self.products)
        dispatcher = LocalDispatcher(self.config.num_routed_experts)
        model = Transformer(self.config, dispatcher, self.dtype, computing=computing, context=context)
        initialize_weights(model, 1)
        return model


def evaluate(case: Case, context: ContextGroup) -> dict[str, Tensor]:
    """Returns the losses by name and every gradient."""
    model, batch, objective = case.model(context), case.batch(context), make_objective(case.config)
    store = GradientStore(model.parameters())
    if case.is_phased:
        sums = phased(model, 2, batch, store, objective)
    else:
        sums = LossSums(loss_names(case.config.mtp_depth))
        model.loss(batch, objective, sums).backward()
    found = {"losses": sums.settle()}
    return found | {name: store.gradient(weight) for name, weight in model.named_parameters()}


def _open(world_size: int, exchange: ContextExchange) -> ContextGroup:
    layout = Layout(ParallelismConfig(pipeline=1, data=1, expert=1, context=world_size), ranks_per_node=2)
    return open_context(distributed.group.WORLD, layout, Observers(Traffic(), CollectiveLog()), exchange)


def _evaluate_all(rank: int, world_size: int, cases: list[Case], exchange: ContextExchange) -> list[Any]:
    group = _open(world_size, exchange)
    return [evaluate(case, group) for case in cases]


def _saved_by_all(rank: int, world_size: int, cases: list[Case], exchange: ContextExchange) -> list[int]:
    group = _open(world_size, exchange)
    return [kept_bytes(case.model(group), case.batch(group)) for case in cases]


LAYER: frozenset[Recomputed] = frozenset({*RECOMPUTED, "layer"})

CASES = [
    Case(is_packed=True, config=replace(MODEL, mtp_depth=2), recomputed=frozenset()),
    Case(is_phased=True, is_packed=True, config=replace(MODEL, mtp_hidden="pre_norm", q_lora_rank=None)),
    Case(is_phased=True, recomputed=LAYER),
]


@pytest.mark.slow
@pytest.mark.parametrize(("exchange", "size"), [("gather", 4), ("ring", 2)])
def test_loss_and_gradients_of_all_ranks_add_up_to_those_of_one(exchange: ContextExchange, size: int) -> None:
    """Documents cross borders of segments, MTP modules read the tokens behind them, one sequence has padding."""
    results = run_ranks(size, _evaluate_all, CASES, exchange)
    for place, case in enumerate(CASES):
        expected = evaluate(case, ALONE)
        for name, exact in expected.items():
            made = torch.stack([result[place][name] for result in results]).sum(0)
            error, largest = float((made - exact).abs().max()), float(exact.abs().max())
            assert error <= 1e-10 * largest, f"{name}, case {place}, {exchange}, {size} ranks: {error} of {largest}"


def predicted_bytes(case: Case, size: int, *, is_ring: bool = False) -> int:
    computing = Computing(recomputed=case.recomputed, products=case.products)
    kept_ranks = 0 if is_ring else num_kept_ranks(size)
    tokens = case.tokens // size
    return counted_bytes(case.config, case.dtype, computing, tokens, context=size, kept_ranks=kept_ranks)


SAVED_CASES = [
    Case(dtype=dtype, recomputed=recomputed, config=config)
    for dtype, recomputed, config in (
        (torch.float64, frozenset(RECOMPUTED), replace(MODEL, num_layers=2)),
        (torch.float32, frozenset[Recomputed](), replace(MODEL, num_layers=2, v_head_dim=24, mtp_depth=2)),
        (torch.bfloat16, frozenset[Recomputed]({"norm"}), replace(MODEL, num_layers=2, q_lora_rank=None)),
    )
] + [Case(dtype=torch.bfloat16, products="fp8", config=replace(IN_FP8, num_layers=2))]


@pytest.mark.slow
@pytest.mark.parametrize(("exchange", "size"), [("gather", 3), ("ring", 2)])
def test_ranks_keep_what_the_account_counts(exchange: ContextExchange, size: int) -> None:
    results = run_ranks(size, _saved_by_all, SAVED_CASES, exchange)
    for place, case in enumerate(SAVED_CASES):
        predicted = predicted_bytes(case, size, is_ring=exchange == "ring")
        assert [result[place] for result in results] == [predicted] * size, f"case {place}, {exchange}"


@pytest.mark.slow
def test_activations_of_32k_tokens_on_four_ranks_are_those_of_8k_on_one() -> None:
    """DeepSeek-V3 keeps at most 2 % more on each rank: latents of three other ranks, and logarithms of 128 heads."""
    config = compose_run(["model=v3_671b"]).model
    alone = {"pads_heads": False, "device": "cuda"}
    shapes = (alone, alone | {"context": 4, "kept_ranks": 3})
    kinds: tuple[Products, ...] = ("own", "fp8")
    for computing in (Computing(recomputed=frozenset(RECOMPUTED), products=products) for products in kinds):
        totals = [counted_bytes(config, torch.bfloat16, computing, 8192, **shape) for shape in shapes]
        assert totals[0] < totals[1] <= 1.02 * totals[0]


SMALL = replace(MODEL, hidden_size=10, num_heads=3, norm_eps=1e-3)
WHOLE_QUERIES = replace(SMALL, q_lora_rank=None, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=16)
ATTENTION_IN_FP8 = replace(MODEL, hidden_size=160, num_heads=3, q_lora_rank=136, kv_lora_rank=48, v_head_dim=20)
FP8 = Computing(products="fp8")


@dataclass(frozen=True, kw_only=True)
class AttentionCase:
    config: MlaConfig = SMALL
    computing: Computing = Computing()  # noqa: RUF009  frozen
    dtype: torch.dtype = torch.float64
    is_packed: bool = False
    is_split: bool = False


ATTENTION_CASES = [
    AttentionCase(),
    AttentionCase(computing=Computing(recomputed=frozenset({"norm"})), is_packed=True, is_split=True),
    AttentionCase(computing=Computing(recomputed=frozenset({"mla_up"})), is_split=True),
    AttentionCase(computing=Computing(recomputed=frozenset({"norm", "mla_up"})), is_packed=True),
    AttentionCase(config=WHOLE_QUERIES, is_packed=True, is_split=True),
]

NARROW_CASES = [
    AttentionCase(dtype=torch.bfloat16, is_packed=True),
    AttentionCase(config=ATTENTION_IN_FP8, computing=FP8, dtype=torch.bfloat16, is_packed=True, is_split=True),
    AttentionCase(config=replace(ATTENTION_IN_FP8, q_lora_rank=None), computing=FP8, dtype=torch.float32),
]


def attend_in_slices(case: AttentionCase, ranks: ContextGroup, slices: int) -> list[dict[str, Tensor]]:
    """Returns output and gradient of each slice, and with the last one the gradients of all weights."""
    module = _Module(case)
    documents = Documents.from_positions(torch.tensor(PLACES)) if case.is_packed else None
    parts = sliced_parts([TOKENS // slices] * slices, ranks.size)
    sequences = SlicedSequences(parts)
    whole = [randn(2, TOKENS, case.config.hidden_size, seed=seed, dtype=case.dtype) for seed in (2, 3)]
    members = [index * ranks.size + ranks.index for index in range(slices)]
    inputs = [parts.take(whole[0], member).clone().requires_grad_() for member in members]
    outputs = []
    for index, x in enumerate(inputs):
        context = sequences.context(0, index, ranks)
        outputs.append(module.self_attn(x, module.norm, None, documents, context))
    for out, member in reversed(list(zip(outputs, members, strict=True))):
        out.backward(parts.take(whole[1], member))
    assert not list(sequences.shared())
    assert not list(sequences.carried())
    found: list[dict[str, Tensor]] = [{"output": out.detach()} for out in outputs]
    for made, x in zip(found, inputs, strict=True):
        assert x.grad is not None
        made["x"] = x.grad
    found[-1] |= {name: weight.grad for name, weight in module.named_parameters() if weight.grad is not None}
    return found


class _Module(nn.Module):
    def __init__(self, case: AttentionCase) -> None:
        super().__init__()
        config, computing = case.config, case.computing
        self.norm = RmsNorm(config.hidden_size, config.norm_eps, case.dtype)
        linears = build_linears(computing)
        self.self_attn = LatentAttention(config, case.dtype, computing.attention, linears)
        randomize(self, 1, 0.4 if config.hidden_size < 100 else 0.1)


def attend(case: AttentionCase, context: ContextGroup, *, is_exact: bool = False) -> dict[str, Tensor]:
    """Returns the output, and the gradients of the input and of every weight.

    Args:
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


def _attend_all(rank: int, world_size: int, cases: list[AttentionCase], exchange: ContextExchange) -> list[Any]:
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


@pytest.mark.slow
@pytest.mark.parametrize(("exchange", "size"), [("gather", 2), ("gather", 4), ("ring", 4)])
def test_attention_of_all_ranks_equals_that_of_one(exchange: ContextExchange, size: int) -> None:
    results = run_ranks(size, _attend_all, ATTENTION_CASES, exchange)
    for place, case in enumerate(ATTENTION_CASES):
        expected, parts = attend(case, ALONE), [result[place][0] for result in results]
        assert expected.keys() == parts[0].keys()
        for name, exact in expected.items():
            assert_near(joined(parts, name), exact, 1e-10, f"{name}, {exchange}, {size} ranks, {case}")


def _attend_all_in_slices(
    rank: int, world_size: int, cases: list[AttentionCase], exchange: ContextExchange
) -> list[tuple[list[dict[str, Tensor]], int]]:
    observers = Observers(Traffic(), CollectiveLog())
    layout = Layout(ParallelismConfig(pipeline=1, data=world_size, expert=1), ranks_per_node=2)
    group = open_context(distributed.group.WORLD, layout, observers, exchange)
    found = []
    for case in cases:
        made = attend_in_slices(case, group, 3)
        snapshot = observers.traffic.take()
        found.append((made, snapshot.num_bytes_within_node + snapshot.num_bytes_across_nodes))
    return found


@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_slices_on_several_ranks_attend_and_send_as_predicted(exchange: ContextExchange) -> None:
    """Each rank holds two segments of every slice. Outputs and gradients are those of whole sequences on one rank."""
    cases = [AttentionCase(), AttentionCase(is_packed=True)]
    results = run_ranks(2, _attend_all_in_slices, cases, exchange)
    parts = sliced_parts([TOKENS // 3] * 3, 2)
    for place, case in enumerate(cases):
        expected = attend(replace(case, is_split=False), ALONE)
        made = [result[place][0] for result in results]
        for name, exact in expected.items():
            if name in ("output", "x"):
                whole = torch.empty_like(exact)
                for index, rank in product(range(3), range(2)):
                    parts.put(made[rank][index][name], 2 * index + rank, whole)
            else:
                whole = made[0][-1][name] + made[1][-1][name]
            assert_near(whole, exact, 1e-10, f"{name}, {exchange}, {case}")
        value = case.dtype.itemsize * case.config.cached_values
        sizes = {"row_bytes": value, "gradient_bytes": value, "wide_gradient_bytes": value}
        predicted = forecast_context_bytes(size=2, num_tokens=2 * TOKENS, is_ring=exchange == "ring", slices=3, **sizes)
        assert [result[place][1] for result in results] == [predicted.forward + predicted.backward] * 2


@pytest.mark.slow
@pytest.mark.parametrize(("exchange", "size"), [("gather", 4), ("ring", 2)])
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
    cases = [
        AttentionCase(),
        AttentionCase(dtype=torch.bfloat16),
        AttentionCase(config=ATTENTION_IN_FP8, computing=FP8, dtype=torch.bfloat16),
    ]
    results = run_ranks(size, _attend_all, cases, exchange)
    for place, case in enumerate(cases):
        value, num_values = case.dtype.itemsize, case.config.cached_values
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
