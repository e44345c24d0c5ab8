"""The account of activations against saved-tensor hooks, and what each kind of recomputation takes off."""

from dataclasses import replace
from itertools import chain, combinations

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from comm.dispatch.local import LocalDispatcher
from model.account import MicroBatchShape, count_activations
from model.config import RECOMPUTED, Computing, ModelConfig, Recomputed
from model.gradients import GradientStore
from model.objective import CrossEntropy, LossSums, MicroBatch, loss_names
from model.stage import Stage
from model.transformer import Transformer, initialize_weights
from tests.model.test_stage import run_phases
from tests.tiny import MODEL

SUBSETS = [frozenset(some) for some in chain.from_iterable(combinations(RECOMPUTED, size) for size in range(4))]


class Counter:
    """Memory that is kept for a backward: each storage once, weights left out."""

    def __init__(self, model: Transformer) -> None:
        self._weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self._seen: dict[int, int] = {}
        self._kept: list[Tensor] = []  # their memory must not be used again while others are counted

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._weights and tensor.numel() > 1:
            self._seen[storage.data_ptr()] = storage.nbytes()
            self._kept.append(tensor)
        return tensor

    def total(self) -> int:
        return sum(self._seen.values())


def make_model(config: ModelConfig, dtype: torch.dtype, recomputed: frozenset[Recomputed]) -> Transformer:
    computing = Computing(recomputed=recomputed)
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


def saved_bytes(config: ModelConfig, dtype: torch.dtype, recomputed: frozenset[Recomputed], tokens: int) -> int:
    """Returns the bytes that the loss of a whole model saves under plain autograd."""
    model = make_model(config, dtype, recomputed)
    counter, depths = Counter(model), config.mtp_depth + 1
    objective, sums = CrossEntropy(factors=(1.0,) * depths, balance=1.0), LossSums(loss_names(depths - 1))
    with saved_tensors_hooks(counter.pack, lambda tensor: tensor):
        loss = model.loss(make_batch(config, tokens), objective, sums)
    loss.backward()
    return counter.total()


def saved_bytes_by_phases(config: ModelConfig, dtype: torch.dtype, recomputed: frozenset[Recomputed]) -> int:
    """Returns the bytes that one stage with the whole model saves, phase by phase, with a dispatch and combine."""
    model = make_model(config, dtype, recomputed)
    counter, depths = Counter(model), config.mtp_depth + 1
    objective, sums = CrossEntropy(factors=(1.0,) * depths, balance=1.0), LossSums(loss_names(depths - 1))
    stage = Stage(model, range(config.num_layers), first=True, last=True)
    run = stage.start(make_batch(config, 24), objective, sums, GradientStore(model.parameters()))
    with saved_tensors_hooks(counter.pack, lambda tensor: tensor):
        run_phases(run, stage, backward=False)
    run_phases(run, stage, backward=True)
    return counter.total()


def predicted_bytes(
    config: ModelConfig,
    dtype: torch.dtype,
    recomputed: frozenset[Recomputed],
    tokens: int,
    expert_rows: int | None = None,
) -> int:
    shape = MicroBatchShape(
        sequences=2,
        tokens=tokens,
        value_bytes=dtype.itemsize,
        wide_bytes=max(4, dtype.itemsize),
        pads_heads=True,
        expert_rows=expert_rows,
    )
    return count_activations(config, shape, recomputed).total(config)


@pytest.mark.parametrize("recomputed", SUBSETS, ids=lambda some: "+".join(sorted(some)) or "none")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_account_equals_what_hooks_count(recomputed: frozenset[Recomputed], dtype: torch.dtype) -> None:
    predicted = predicted_bytes(MODEL, dtype, recomputed, 24)
    assert saved_bytes(MODEL, dtype, recomputed, 24) == predicted


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
@pytest.mark.parametrize("recomputed", [frozenset(RECOMPUTED), frozenset[Recomputed]()], ids=["all", "none"])
def test_account_equals_what_hooks_count_for_other_shapes(
    config: ModelConfig, recomputed: frozenset[Recomputed]
) -> None:
    predicted = predicted_bytes(config, torch.float32, recomputed, 17)
    assert saved_bytes(config, torch.float32, recomputed, 17) == predicted


@pytest.mark.parametrize("recomputed", [frozenset(RECOMPUTED), frozenset[Recomputed]()], ids=["all", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_account_equals_what_hooks_count_in_phases(recomputed: frozenset[Recomputed], dtype: torch.dtype) -> None:
    expert_rows = 2 * 24 * MODEL.num_experts_per_token
    assert saved_bytes_by_phases(MODEL, dtype, recomputed) == predicted_bytes(MODEL, dtype, recomputed, 24, expert_rows)


def test_each_kind_of_recomputation_keeps_less() -> None:
    everything = saved_bytes(MODEL, torch.float32, frozenset(), 24)
    kinds: list[Recomputed] = list(RECOMPUTED)
    saved = [everything - saved_bytes(MODEL, torch.float32, frozenset([kind]), 24) for kind in kinds]
    assert min(saved) > 0.02 * everything
    assert everything - saved_bytes(MODEL, torch.float32, frozenset(kinds), 24) == sum(saved)
