"""What a step showed, over all ranks: its line in `metrics.jsonl`."""

import resource
from collections.abc import Sequence
from typing import Any

import torch
from torch import distributed as dist

from train.assemble import Assembly
from train.exchange import exchange_metrics
from train.records.metrics import mfu
from train.records.pictures import PipelineWatch, bubble_of, window_slots
from train.step import StepResult


def record_of(assembly: Assembly, watch: PipelineWatch, done: int, result: StepResult) -> dict[str, Any]:
    """The step's line in `metrics.jsonl`; every rank must ask, as traffic, time and memory are those of all."""
    traffic, use, model = (
        assembly.observers.traffic.take(),
        watch.use(assembly, result.execution),
        assembly.config.model,
    )
    world = assembly.groups.world
    with assembly.observers.log.collective("world", world, "sum of traffic"):
        clipped, num_layers = assembly.observers.clips.take(), model.num_layers + model.mtp_depth
        exchange = exchange_metrics(traffic, clipped, num_layers, world, assembly.device)
    mine = _peak_memory_bytes(assembly.device)
    used_seconds, memory = _reduce(assembly, [use.used_seconds, mine], dist.ReduceOp.SUM)
    mesh, data_index = assembly.config.parallelism, assembly.layout.data_index(assembly.groups.rank)
    largest = [mine, *window_slots(use, data_index, mesh.data)]
    peak, *slots = _reduce(assembly, largest, dist.ReduceOp.MAX)
    losses = result.losses
    return {
        "step": done,
        "global_batch_sequences": assembly.config.batch.global_sequences,
        "loss": losses.total,
        "main_loss": losses.main,
        "mtp_loss": sum(losses.mtp) / max(len(losses.mtp), 1),
        "balance_loss": losses.balance,
        "grad_norm": result.grad_norm,
        "lr": result.rates.learning_rate,
        "mtp_loss_weight": result.rates.mtp_loss_weight,
        "bias_update_rate": result.rates.bias_update,
        "step_seconds": result.seconds,
        "tokens_per_second": result.tokens / result.seconds,
        **mfu(assembly.config, result.tokens / result.seconds),
        "peak_memory_bytes": int(peak),
        "mean_peak_memory_bytes": int(memory / assembly.layout.world_size),
        "pipeline_bubble": bubble_of(used_seconds, slots, mesh.pipeline),
        **result.balance.metrics(),
        **exchange,
    }


def _reduce(assembly: Assembly, values: Sequence[float], how: dist.ReduceOp.RedOpType) -> list[float]:
    """Over all ranks, in float64."""
    numbers = torch.tensor(values, dtype=torch.float64, device=assembly.device)
    with assembly.observers.log.collective("world", assembly.groups.world, "the step's record"):
        dist.all_reduce(numbers, op=how, group=assembly.groups.world)
    reduced: list[float] = numbers.tolist()
    return reduced


def _peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
