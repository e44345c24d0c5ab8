"""What phases keep between forward and backward, measured without memory, against the tensors that they hold.

And what a model in FP8 keeps from forward to backward, and from backward to W.
"""

import functools
import types
from collections import deque
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from itertools import chain, combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from comm.dispatch.local import LocalDispatcher
from launch.config.run import compose_run
from model.config import LAYER, RECOMPUTED, Computing, ModelConfig, Products, Recomputed
from model.objective import MicroBatch
from model.phases import ComputePhase
from model.precision.fp8_rows import Fp8Maps
from model.size import StageShape
from model.transformer import Transformer, initialize_weights
from model.values import Hidden, HiddenGradients
from tests.model.live_memory import counted_bytes, kept_bytes, make_sizes
from tests.model.test_phases import phases_of
from tests.tiny import GQA, MODEL
from train.predict.memory import stage_phases

ALL = frozenset(RECOMPUTED)
TYPES: tuple[Products, ...] = ("fp8", "own")
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
        GQA,
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v2_lite_16b", "v3_671b"])
def test_a_layer_of_a_training_run_keeps_at_most_three_fifths_of_what_it_keeps_in_bf16(name: str) -> None:
    """Each rank's experts get as many rows as it sends."""
    config = compose_run([f"model={name}"]).model
    for pads_heads in (False, True):
        made = {"sequences": 2, "tokens": 4096, "pads_heads": pads_heads, "device": "cuda"}
        shapes = [StageShape(layers=range(first, first + 1), is_first=False, is_last=False) for first in (0, 3)]
        for shape in shapes:
            ours, theirs = (
                sum(
                    phase.kept
                    for phase in stage_phases([make_sizes(config, torch.bfloat16, computing, **made)], shape)[0]
                )
                for computing in (Computing(recomputed=ALL, products=products) for products in TYPES)
            )
            assert ours <= 0.6 * theirs


def reachable(held: object) -> Iterator[Tensor]:
    """Tensors that something holds, through closures, partial functions, containers and dataclasses; no weights.

    Anything else is unknown, and might hold numbers as well.
    """
    inside: list[object] = []
    if held is None or isinstance(held, nn.Parameter | Fp8Maps | str | int | float | slice | torch.dtype):
        return
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, functools.partial):
        inside = [held.func, *held.args, *held.keywords.values()]
    elif isinstance(held, types.FunctionType):
        inside = [cell.cell_contents for cell in held.__closure__ or ()]
    elif isinstance(held, functools._lru_cache_wrapper):
        inside = [held.__wrapped__]
    elif isinstance(held, dict):
        inside = list(held.values())
    elif isinstance(held, list | tuple | set | frozenset | deque):
        inside = list(held)
    elif is_dataclass(held):
        inside = [getattr(held, field.name) for field in fields(held)]
    else:
        assert isinstance(held, types.BuiltinFunctionType), type(held)
    for each in inside:
        yield from reachable(each)


def waiting(products: Products, layer: int) -> list[Tensor]:
    """Returns the bytes held for weight gradients of a layer after its backward, when all else is released."""
    config = replace(WIDE, mtp_depth=0)
    phases = phases_of(make_model(config, torch.bfloat16, Computing(recomputed=ALL, products=products)), layer)
    values: Any = Hidden(torch.randn(2, 70, config.hidden_size, dtype=torch.bfloat16))
    for phase in phases:
        values = phase.forward(values) if isinstance(phase, ComputePhase) else phase.forward(values).wait()
    gradients: Any = HiddenGradients(torch.randn_like(values.hidden_BTD))
    del values
    for phase in reversed(phases):
        gradients = phase.backward(gradients) if isinstance(phase, ComputePhase) else phase.backward(gradients).wait()
    computed = [phase for phase in phases if isinstance(phase, ComputePhase)]
    found = {id(tensor): tensor for phase in computed for tensor in reachable(phase._queue._waiting)}
    for phase in computed:
        phase.weight()
        assert not list(reachable(phase._queue._waiting))
    return list(found.values())


@pytest.mark.parametrize("layer", [0, 1], ids=["dense", "moe"])
def test_between_backward_and_weight_gradients_only_codes_wait(layer: int) -> None:
    """And a scale for every 128 of them."""
    held = waiting("fp8", layer)
    codes = [tensor for tensor in held if tensor.dtype in (torch.float8_e4m3fn, torch.uint8)]
    scales = [tensor for tensor in held if tensor.dtype == torch.float32]
    assert len(codes) + len(scales) == len(held)
    assert sum(tensor.numel() for tensor in codes) > 100_000
    ratio = sum(tensor.numel() for tensor in codes) / sum(tensor.numel() for tensor in scales)
    # Of 64 inputs a tile is half full.
    assert ratio > 64
