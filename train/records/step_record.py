"""What a step showed, over all ranks: its line in `metrics.jsonl`."""

import resource
from collections.abc import Sequence
from typing import Any

import torch
from torch import distributed as dist

from train.exchange import exchange_metrics
from train.records.metrics import mfu
from train.records.pictures import PipelineWatch, bubble_of, window_slots
from train.replica import Replica
from train.step import StepResult
from train.world import World


def record_of(
    replica: Replica, watch: PipelineWatch, done: int, result: StepResult, peak_flops: float | None
) -> dict[str, Any]:
    """Returns the step's line in `metrics.jsonl`; all ranks call it, because it sums traffic, time and memory.

    Args:
        replica: that ran the step.
        watch: of its pipeline.
        done: steps done, this one included.
        result: of the step.
        peak_flops: of each rank, for MFU; None: unknown.
    """
    world, model, mesh = replica.world, replica.config.model, replica.world.layout.parallelism
    traffic, use = replica.observers.traffic.take(), watch.use(replica, result.execution)
    with world.log.collective("world", world.groups.world, "sum of traffic"):
        clipped, num_layers = replica.observers.clips.take(), model.num_layers + model.mtp_depth
        exchange = exchange_metrics(traffic, clipped, num_layers, world.groups.world, world.device)
    mine = _peak_memory_bytes(world.device)
    used_seconds, memory = _reduce(world, [use.used_seconds, mine], dist.ReduceOp.SUM)
    largest = [mine, *window_slots(use, world.data_index, mesh.data)]
    peak, *slots = _reduce(world, largest, dist.ReduceOp.MAX)
    speed, length = result.tokens / result.seconds, replica.config.batch.sequence_length_tokens
    losses = result.losses
    return {
        "step": done,
        "global_batch_sequences": replica.global_sequences,
        "loss": losses.total,
        "main_loss": losses.main,
        "mtp_loss": sum(losses.mtp) / max(len(losses.mtp), 1),
        "balance_loss": losses.balance,
        "grad_norm": result.grad_norm,
        "lr": result.rates.learning_rate,
        "mtp_loss_weight": result.rates.mtp_loss_weight,
        "bias_update_rate": result.rates.bias_update,
        "step_seconds": result.seconds,
        "tokens_per_second": speed,
        **mfu(model, length, speed, None if peak_flops is None else peak_flops * mesh.world_size),
        "peak_memory_bytes": int(peak),
        "mean_peak_memory_bytes": int(memory / mesh.world_size),
        "pipeline_bubble": bubble_of(used_seconds, slots, mesh.pipeline),
        **result.balance.metrics(),
        **exchange,
    }


def _reduce(world: World, values: Sequence[float], how: dist.ReduceOp.RedOpType) -> list[float]:
    """Reduces numbers over all ranks, in float64."""
    reduced: list[float] = world.reduce(torch.tensor(values, dtype=torch.float64), "the step's record", how).tolist()
    return reduced


def _peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
