"""What phases keep between forward and backward, measured without memory, against the tensors that they hold."""

from dataclasses import replace
from itertools import chain, combinations

import pytest
import torch

from comm.dispatch.local import LocalDispatcher
from model.config import LAYER, RECOMPUTED, Computing, ModelConfig, Products, Recomputed
from model.objective import MicroBatch
from model.transformer import Transformer, initialize_weights
from tests.model.live_memory import counted_bytes, kept_bytes
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


@pytest.mark.slow
@pytest.mark.covering(1)
@pytest.mark.parametrize("recomputed", [*SUBSETS, LAYERS], ids=lambda some: "+".join(sorted(some)) or "none")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_phases_keep_what_is_counted(recomputed: frozenset[Recomputed], dtype: torch.dtype) -> None:
    check(MODEL, dtype, Computing(recomputed=recomputed), 24)


@pytest.mark.slow
@pytest.mark.covering(1)
@pytest.mark.parametrize(
    "config",
    [
        replace(MODEL, q_lora_rank=None, v_head_dim=24, mtp_depth=2),
        replace(MODEL, num_shared_experts=2, num_dense_layers=0),
        replace(MODEL, num_shared_experts=0, num_dense_layers=4, mtp_depth=0),
    ],
)
@pytest.mark.parametrize("recomputed", [ALL, NONE], ids=["all", "none"])
def test_phases_of_other_shapes_keep_what_is_counted(config: ModelConfig, recomputed: frozenset[Recomputed]) -> None:
    check(config, torch.float32, Computing(recomputed=recomputed), 17)


@pytest.mark.slow
@pytest.mark.covering(1)
@pytest.mark.parametrize("recomputed", [ALL, LAYERS], ids=["all", "layer"])
@pytest.mark.parametrize(
    "config",
    [
        WIDE,
        replace(WIDE, q_lora_rank=None, num_shared_experts=2, num_dense_layers=0, v_head_dim=24, mtp_depth=2),
        replace(MODEL, num_shared_experts=0, num_dense_layers=1, mtp_depth=0, v_head_dim=7, num_heads=3),
    ],
    ids=["all features", "no query rank", "odd"],
)
@pytest.mark.parametrize("products", ["fp8", "fp8_power_of_two"])
def test_phases_in_fp8_keep_what_is_counted(
    config: ModelConfig, recomputed: frozenset[Recomputed], products: Products
) -> None:
    check(config, torch.bfloat16, Computing(recomputed=recomputed, products=products), 24)


@pytest.mark.slow
def test_each_kind_of_recomputation_keeps_less() -> None:
    """What kinds save adds up."""

    def counted(recomputed: frozenset[Recomputed]) -> int:
        return counted_bytes(MODEL, torch.float32, Computing(recomputed=recomputed), 24)

    saved = [counted(NONE) - counted(frozenset([kind])) for kind in RECOMPUTED]
    assert min(saved) > 0.02 * counted(NONE)
    assert counted(NONE) - counted(ALL) == sum(saved)
