"""What phases keep between forward and backward, counted by arithmetic, against the tensors that they hold."""

from dataclasses import replace
from itertools import chain, combinations
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from comm.dispatch.local import LocalDispatcher
from comm.protocol import Arrived, CompletedWork, Dispatcher, Label
from model.config import LAYER, RECOMPUTED, Computing, ModelConfig, Recomputed
from model.gradients import GradientStore
from model.objective import BALANCE, LossSums, MicroBatch
from model.phases.block import BalanceLoss, block_phases
from model.phases.compute import ComputePhase
from model.phases.exchange import DispatchPhase
from model.size import StageShape, stage_phases
from model.transformer import Part, Transformer, initialize_weights
from model.values import Hidden
from tests.model.live_memory import counted_bytes, kept_bytes, make_sizes
from tests.model.test_size import preset
from tests.tiny import MODEL

ALL = frozenset(RECOMPUTED)
NONE = frozenset[Recomputed]()
LAYERS = frozenset[Recomputed]([LAYER])
SUBSETS = [frozenset(some) for some in chain.from_iterable(combinations(RECOMPUTED, size) for size in range(4))]
WIDE = replace(
    MODEL,
    hidden_size=192,
    dense_intermediate_size=512,
    q_lora_rank=96,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    num_routed_experts=16,
    expert_intermediate_size=96,
)
"""Rows of more than one tile of 128 codes."""


def make_model(config: ModelConfig, dtype: torch.dtype, computing: Computing) -> Transformer:
    model = Transformer(config, LocalDispatcher(config.num_routed_experts), dtype, computing=computing)
    initialize_weights(model, 1)
    return model


def make_batch(config: ModelConfig, tokens: int) -> MicroBatch:
    ids = torch.randint(config.vocab_size, (2, tokens + 4), generator=torch.Generator().manual_seed(2))
    depths = range(config.mtp_depth + 1)
    return MicroBatch(
        inputs_BT=tuple(ids[:, depth : depth + tokens].contiguous() for depth in depths),
        targets_BT=tuple(ids[:, depth + 1 : depth + 1 + tokens].contiguous() for depth in depths),
    )


def check(config: ModelConfig, dtype: torch.dtype, computing: Computing, tokens: int) -> None:
    kept = kept_bytes(make_model(config, dtype, computing), make_batch(config, tokens))
    assert kept == counted_bytes(config, dtype, computing, tokens)


@pytest.mark.parametrize("recomputed", [*SUBSETS, LAYERS], ids=lambda some: "+".join(sorted(some)) or "none")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_phases_keep_what_is_counted(recomputed: frozenset[Recomputed], dtype: torch.dtype) -> None:
    check(MODEL, dtype, Computing(recomputed=recomputed), 24)


@pytest.mark.parametrize(
    "config",
    [
        replace(MODEL, q_lora_rank=None),
        replace(MODEL, num_shared_experts=0, mtp_depth=0),
        replace(MODEL, num_shared_experts=2, num_dense_layers=0),
        replace(MODEL, v_head_dim=24, mtp_depth=2),
        replace(MODEL, num_dense_layers=4, mtp_depth=0),
    ],
)
@pytest.mark.parametrize("recomputed", [ALL, NONE], ids=["all", "none"])
def test_phases_of_other_shapes_keep_what_is_counted(config: ModelConfig, recomputed: frozenset[Recomputed]) -> None:
    check(config, torch.float32, Computing(recomputed=recomputed), 17)


@pytest.mark.parametrize("recomputed", [ALL, LAYERS], ids=["all", "layer"])
@pytest.mark.parametrize(
    "config",
    [
        WIDE,
        replace(WIDE, q_lora_rank=None, num_shared_experts=2, mtp_depth=0),
        replace(WIDE, num_shared_experts=0, num_dense_layers=0, v_head_dim=24, mtp_depth=2),
        replace(MODEL, num_dense_layers=4, mtp_depth=0, v_head_dim=7, num_heads=3),
    ],
    ids=["all features", "no query rank, two shared", "no shared, no dense", "dense, odd"],
)
def test_phases_in_fp8_keep_what_is_counted(config: ModelConfig, recomputed: frozenset[Recomputed]) -> None:
    for products in ("fp8", "fp8_power_of_two"):
        check(config, torch.bfloat16, Computing(recomputed=recomputed, products=products), 24)


def test_each_kind_of_recomputation_keeps_less() -> None:
    """What kinds save adds up."""

    def counted(recomputed: frozenset[Recomputed]) -> int:
        return counted_bytes(MODEL, torch.float32, Computing(recomputed=recomputed), 24)

    saved = [counted(NONE) - counted(frozenset([kind])) for kind in RECOMPUTED]
    assert min(saved) > 0.02 * counted(NONE)
    assert counted(NONE) - counted(ALL) == sum(saved)


class EvenDispatcher(Dispatcher):
    """Delivers as many rows as tokens were sent copies of, spread evenly over a rank's experts; sends nothing."""

    num_local_experts = 4

    def plan(self, ids_TK: Tensor, weights_TK: Tensor | None = None, label: Label | None = None) -> Any:
        return ids_TK.numel()

    def dispatch(self, rows_TD: Tensor, weights_TK: Tensor, handle: Any) -> Any:
        rows_AD = rows_TD.new_empty(handle, rows_TD.shape[1])
        counts = (handle // self.num_local_experts,) * self.num_local_experts
        return CompletedWork(Arrived(rows_AD, weights_TK.new_empty(handle), counts))


class FusedAttention(torch.autograd.Function):
    """What a fused attention kernel keeps: queries, keys, values, output and logarithms of sums of exponentials."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mixed = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, mixed, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return mixed


@pytest.mark.parametrize("recomputed", [*SUBSETS, LAYERS], ids=lambda some: "+".join(sorted(some)) or "none")
def test_layers_of_v3_keep_what_is_counted(recomputed: frozenset[Recomputed], monkeypatch: pytest.MonkeyPatch) -> None:
    """At real size on tensors without memory, with the widths that CUDA's attention kernels read."""
    config, computing = preset("v3_671b"), Computing(recomputed=recomputed)
    monkeypatch.setattr(
        functional, "scaled_dot_product_attention", lambda *heads, **_: FusedAttention.apply(*heads[:3])
    )
    shape = {"sequences": 1, "tokens": 4096, "pads_heads": False, "device": "cuda", "num_local_experts": 4}
    sizes = make_sizes(config, torch.bfloat16, computing, **shape)
    with torch.device("meta"):
        dispatcher = EvenDispatcher()
        part = Part(layers=(2, 3), experts=range(4), embedding=False, head=False)
        model = Transformer(config, dispatcher, torch.bfloat16, part, computing)
        weights = {each.untyped_storage()._cdata for each in (*model.parameters(), *model.buffers())}
        store, balance = GradientStore(model.parameters()), BalanceLoss(1.0, LossSums((BALANCE,)))
        for layer in part.layers:
            values: Any = Hidden(torch.empty(1, 4096, config.hidden_size, dtype=torch.bfloat16))
            kept: dict[int, int] = {}
            for phase in block_phases(model.block(layer), dispatcher, store, balance, Label(layer, 0, 0)):
                if isinstance(phase, ComputePhase):
                    values = phase.forward(values)
                    storages = [tensor.untyped_storage() for tensor in phase.kept() if tensor.numel() > 1]
                    kept |= {storage._cdata: storage.nbytes() for storage in storages}
                elif isinstance(phase, DispatchPhase):
                    values = phase.forward(values).wait()
            stage = StageShape(layers=range(layer, layer + 1), is_first=False, is_last=False)
            found = sum(size for storage, size in kept.items() if storage not in weights)
            assert found == sum(phase.kept for phase in stage_phases(sizes, stage)), layer
