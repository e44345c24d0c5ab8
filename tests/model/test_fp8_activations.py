"""Bytes that a model in FP8 keeps from forward to backward, and from backward to W, equal its account."""

import functools
import gc
import types
from collections import deque
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from comm.dispatch.local import LocalDispatcher
from launch.config.run_config import compose_run
from model.account import ActivationAccount, MicroBatchShape, count_activations
from model.config import RECOMPUTED, Computing, ModelConfig, Products
from model.gradients import GradientStore
from model.objective import CrossEntropy, LossSums, MicroBatch, loss_names
from model.phases.compute import ComputePhase
from model.precision.fp8.maps import Fp8Maps
from model.stage import Stage
from model.transformer import Transformer, initialize_weights
from model.values import Hidden, HiddenGradients
from tests.model.live_memory import LiveMemory
from tests.model.test_activations import Counter, make_batch
from tests.model.test_phases import phases_of
from tests.model.test_stage import phased, run_phases
from tests.tiny import MODEL

ALL = frozenset(RECOMPUTED)
TYPES: tuple[Products, ...] = ("fp8", "own")
FP8: tuple[Products, ...] = ("fp8", "fp8_power_of_two")
PRESETS = ("quickstart", "v2_lite_16b", "moonlight_16b", "v3_671b")
SMALL = replace(
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


def make_model(config: ModelConfig, products: Products) -> Transformer:
    dispatcher = LocalDispatcher(config.num_routed_experts)
    model = Transformer(config, dispatcher, torch.bfloat16, computing=Computing(recomputed=ALL, products=products))
    initialize_weights(model, 1)
    return model


def kept_bytes(model: Transformer, batch: MicroBatch, in_phases: bool) -> int:
    """Returns the bytes kept after the forward, without weights, each storage once."""
    counter, depths = Counter(model), model.config.mtp_depth + 1
    objective, sums = CrossEntropy(factors=(1.0,) * depths, balance=1.0), LossSums(loss_names(depths - 1))
    if not in_phases:
        with saved_tensors_hooks(counter.pack, lambda tensor: tensor):
            loss = model.loss(batch, objective, sums)
        loss.backward()
        return counter.total()
    stage = Stage(model, range(model.config.num_layers), first=True, last=True)
    run = stage.start(batch, objective, sums, GradientStore(model.parameters()))
    with saved_tensors_hooks(counter.pack, lambda tensor: tensor):
        run_phases(run, stage, backward=False)
    run_phases(run, stage, backward=True)
    return counter.total()


def account(
    config: ModelConfig, products: Products, tokens: int = 24, *, in_phases: bool = False, pads_heads: bool = True
) -> ActivationAccount:
    rows = 2 * tokens * config.num_experts_per_token
    shape = MicroBatchShape(
        sequences=2,
        tokens=tokens,
        value_bytes=2,
        wide_bytes=4,
        pads_heads=pads_heads,
        expert_rows=rows if in_phases else None,
    )
    return count_activations(config, shape, ALL, products)


@pytest.mark.parametrize("in_phases", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        replace(SMALL, q_lora_rank=None, num_shared_experts=2, mtp_depth=0),
        replace(SMALL, num_shared_experts=0, num_dense_layers=0, v_head_dim=24, mtp_depth=2),
        replace(MODEL, num_dense_layers=4, mtp_depth=0, v_head_dim=7, num_heads=3),
    ],
    ids=["all features", "no query rank, two shared", "no shared, no dense", "dense, odd"],
)
def test_account_equals_what_hooks_count(config: ModelConfig, in_phases: bool) -> None:
    for products in FP8:
        model, batch = make_model(config, products), make_batch(config, 24)
        predicted = account(config, products, in_phases=in_phases).total(config)
        assert kept_bytes(model, batch, in_phases) == predicted


@pytest.mark.parametrize("name", PRESETS)
def test_a_layer_of_a_training_run_keeps_at_most_three_fifths_of_what_it_keeps_in_bf16(name: str) -> None:
    """Each rank's experts get as many rows as it sends, or all rows stay on the rank, as outside a pipeline."""
    config = compose_run([f"model={name}"]).model
    for in_phases in (True, False):
        for pads_heads in (False, True):
            ours, theirs = (
                account(config, products, 4096, in_phases=in_phases, pads_heads=pads_heads) for products in TYPES
            )
            assert ours.dense <= 0.6 * theirs.dense
            assert ours.moe <= 0.6 * theirs.moe
            assert (ours.embedding, ours.head, ours.merge) == (theirs.embedding, theirs.head, theirs.merge)


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
    config = replace(SMALL, mtp_depth=0)
    phases = phases_of(make_model(config, products), layer)
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


@pytest.fixture
def _garbage_collection_disabled() -> Iterator[None]:
    """Disables garbage collection, so that reference cycles stay alive."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.slow
@pytest.mark.usefixtures("_garbage_collection_disabled")
def test_nothing_stays_of_a_pass_that_is_done_or_given_up() -> None:
    config = replace(SMALL, num_layers=2, mtp_depth=0)
    model, batch = make_model(config, "fp8"), make_batch(config, 24)
    objective = CrossEntropy(factors=(1.0,), balance=1.0)
    with LiveMemory():
        model.loss(batch, objective, LossSums(loss_names(0)))  # what is made once and stays is made here
    gc.collect()
    with LiveMemory() as memory:
        model.loss(batch, objective, LossSums(loss_names(0)))
    assert memory.num_made > 200
    assert [storage.nbytes() for storage in memory.live()] == []
    store = GradientStore(model.parameters())
    with LiveMemory() as memory:
        phased(model, 1, batch, store)
    assert memory.num_made > 500
    assert [storage.nbytes() for storage in memory.live()] == []
