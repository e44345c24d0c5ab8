"""Builds ranks of a job in one process, with fake process groups and tensors without memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import ceil
from typing import Any

import torch
from torch import distributed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from comm.dispatch.local import LocalDispatcher
from comm.groups import Groups
from comm.layout import Layout
from dualpipe.ir import Schedule
from model.attention.form import Attention, rotation_table
from model.linear import GradientStore
from model.transformer import Transformer
from train.config import TrainConfig
from train.core.world import (
    ReplicaConfig,
    build_groups,
    build_model,
    build_stages,
    held_experts,
    stage_part,
    weight_dtype,
)
from train.optim.adamw import MOMENTS, Unit, build_adamw, moments_of, units_of
from train.optim.learning_rate import OptimConfig
from train.optim.matrices import split_unit, stack_of
from train.optim.registry import OPTIMIZERS, most_owned
from train.predict.cut import run_cut
from train.predict.timing import planning_schedule


def build_distinct_ranks(config: TrainConfig) -> list[dict[str, Any]]:
    """Builds one rank for every distinct set of stages; `torch.distributed` is initialized once for each."""
    schedule = planning_schedule(config, config.num_micro_batches)
    holders: dict[frozenset[int], list[int]] = {}
    for pipeline_rank in range(schedule.num_ranks):
        stages = frozenset(stage for _, stage in schedule.stages_of(pipeline_rank))
        holders.setdefault(stages, []).append(pipeline_rank)
    return [_build_rank(config, schedule, tuple(ranks)) for ranks in holders.values()]


@contextmanager
def _fake_process_group(rank: int, world_size: int) -> Iterator[None]:
    """Makes this process a rank of a job without its other ranks."""
    distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def _build_rank(config: TrainConfig, schedule: Schedule, pipeline_ranks: tuple[int, ...]) -> dict[str, Any]:
    """Builds the first data replica of the first of some pipeline ranks, and counts what it holds."""
    layout = Layout(config.parallelism, config.cluster.ranks_per_node)
    with _fake_process_group(layout.rank(pipeline_ranks[0], 0), layout.world_size):
        groups = build_groups(layout, schedule, config.model.mtp_depth, config.cluster)
        model, units = _build_network(config, layout, schedule, groups)
        store = GradientStore(model.parameters())
        return {
            "pipeline_ranks": list(pipeline_ranks),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "weights_bytes": _weight_bytes(config, model),
            "gradients_bytes": sum(gradient.nbytes for gradient in store.gradients()),
            "optimiser_bytes": sum(_optimizer_bytes(unit, config.optim) for unit in units),
        }


def _build_network(
    config: TrainConfig, layout: Layout, schedule: Schedule, groups: Groups
) -> tuple[Transformer, list[Unit]]:
    """Builds this rank's part of the model, and splits its parameters as the optimizer does."""
    cut = run_cut(config, schedule.placement)
    stages = {stage for _, stage in schedule.stages_of(layout.pipeline_index(groups.rank))}
    experts = held_experts(config.model, config.parallelism.expert, layout.expert_index(groups.rank))
    meta = torch.device("meta")
    with meta:
        model = build_model(
            replace(ReplicaConfig.of_run(config), seed=None),
            LocalDispatcher(config.model.num_routed_experts),
            stage_part(config.model, stages, cut, experts),
            meta,
        )
    return model, units_of(model, build_stages(model, stages, cut), schedule, groups)


def _weight_bytes(config: TrainConfig, model: Transformer) -> int:
    """Returns the bytes of weights, buffers, and the rotation tables that attention makes once."""
    stored = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    wide = torch.promote_types(weight_dtype(config.precision), torch.float32)
    table = sum(entry.nbytes for entry in rotation_table(config.model, config.batch.sequence_length_tokens, wide))
    return stored + table * sum(isinstance(module, Attention) for module in model.modules())


def _optimizer_bytes(unit: Unit, config: OptimConfig) -> int:
    """Returns the bytes of state of a unit on the device, for the rank that owns most matrices."""
    rule = OPTIMIZERS.get(config.kind).matrices
    if rule is None:
        return _adamw_bytes(unit, config)
    whole, others = split_unit(unit)
    total = _adamw_bytes(others, config)
    for parameters, group in (
        (whole.groups.matrices, unit.replicas.dense),
        (whole.groups.experts, unit.replicas.experts),
    ):
        stacks = [stack_of(name, tuple(parameter.shape)) for name, parameter in parameters.items()]
        owned = most_owned(stacks, distributed.get_world_size(group), lambda rows, columns: rows * columns)
        for dtype in {parameter.dtype for parameter in parameters.values()}:
            wide = torch.promote_types(dtype, torch.float32)
            buffers = len(rule.buffers) * (2 if config.moments == "bf16" else wide.itemsize)
            total += int(owned) * (buffers + (0 if wide is dtype else wide.itemsize))
    return total


def _adamw_bytes(unit: Unit, config: OptimConfig) -> int:
    """Returns the bytes of this rank's state of a unit on the device, as the configured AdamW makes it."""
    if config.offload:
        return 0
    groups = unit.groups
    replicas = unit.replicas
    if config.sharding == "replicated":
        return sum(_moment_bytes(parameter.numel(), parameter.dtype, config) for parameter in unit.parameters)
    total = 0
    for parameters, group in (
        (groups.matrices, replicas.dense),
        (groups.vectors, replicas.dense),
        (groups.experts, replicas.experts),
    ):
        elements = sum(parameter.numel() for parameter in parameters.values())
        shard = ceil(elements / distributed.get_world_size(group))
        total += shard * torch.float32.itemsize + _moment_bytes(shard, torch.float32, config)
    return total


def _moment_bytes(num_elements: int, dtype: torch.dtype, config: OptimConfig) -> int:
    """Returns the bytes of the moments that AdamW keeps of a tensor."""
    # Fused AdamW refuses tensors on `meta`.
    with FakeTensorMode():
        weights = torch.empty(num_elements, dtype=dtype)
        moments = moments_of(build_adamw([{"params": [weights], "weight_decay": 0.0}], config), weights)
        return sum(moments[name].nbytes for name in MOMENTS)
