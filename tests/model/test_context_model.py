"""The whole model over ranks that share sequences: loss, gradients and what they keep, against one rank."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from comm.config import ParallelismConfig
from comm.context.forecast import num_kept_ranks
from comm.context.group import ContextExchange, open_context
from comm.context.protocol import ALONE, ContextGroup
from comm.dispatch.local import LocalDispatcher
from comm.dispatch.process_group import Observers
from comm.dispatch.traffic import Traffic
from comm.layout import Layout
from comm.watchdog.collective_log import CollectiveLog
from kernels.attention.documents import Documents
from launch.config.run_config import compose_run
from model.config import RECOMPUTED, Computing, ModelConfig, Products, Recomputed
from model.gradients import GradientStore
from model.objective import LossSums, MicroBatch, loss_names
from model.transformer import Transformer, initialize_weights
from tests.context_parts import take_held
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

    config: ModelConfig = MODEL
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
    Case(is_packed=True, config=replace(MODEL, mtp_depth=2)),
    Case(is_phased=True, is_packed=True, config=replace(MODEL, mtp_depth=2, mtp_hidden="pre_norm", q_lora_rank=None)),
    Case(is_phased=True, is_packed=True, recomputed=LAYER),
    Case(recomputed=frozenset()),
]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("exchange", ["gather", pytest.param("ring", marks=pytest.mark.long)])
def test_loss_and_gradients_of_all_ranks_add_up_to_those_of_one(exchange: ContextExchange, size: int) -> None:
    """Documents cross borders of segments, MTP modules read the tokens behind them, one sequence has padding."""
    cases = CASES if size == 4 else CASES[:2]
    results = run_ranks(size, _evaluate_all, cases, exchange)
    for place, case in enumerate(cases):
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
        (torch.float64, frozenset(RECOMPUTED), MODEL),
        (torch.float32, frozenset[Recomputed](), replace(MODEL, v_head_dim=24, mtp_depth=2)),
        (torch.bfloat16, frozenset[Recomputed]({"mla_up"}), MODEL),
        (torch.bfloat16, frozenset[Recomputed]({"norm"}), replace(MODEL, q_lora_rank=None)),
    )
] + [
    Case(dtype=torch.bfloat16, products="fp8", config=config) for config in (IN_FP8, replace(IN_FP8, q_lora_rank=None))
]


@pytest.mark.parametrize(("exchange", "size"), [("gather", 4), ("ring", 2)])
def test_ranks_keep_what_the_account_counts(exchange: ContextExchange, size: int) -> None:
    results = run_ranks(size, _saved_by_all, SAVED_CASES, exchange)
    for place, case in enumerate(SAVED_CASES):
        predicted = predicted_bytes(case, size, is_ring=exchange == "ring")
        assert [result[place] for result in results] == [predicted] * size, f"case {place}, {exchange}"


@pytest.mark.parametrize("products", ["own", "fp8"])
def test_activations_of_32k_tokens_on_four_ranks_are_those_of_8k_on_one(products: Products) -> None:
    """DeepSeek-V3 keeps at most 2 % more on each rank: latents of three other ranks, and logarithms of 128 heads."""
    config = compose_run(["model=v3_671b"]).model
    computing = Computing(recomputed=frozenset(RECOMPUTED), products=products)
    alone = {"pads_heads": False, "device": "cuda"}
    shapes = (alone, alone | {"context": 4, "kept_ranks": 3})
    totals = [counted_bytes(config, torch.bfloat16, computing, 8192, **shape) for shape in shapes]
    assert totals[0] < totals[1] <= 1.02 * totals[0]
