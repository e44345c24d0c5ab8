"""Builds the record of a step over all ranks, which becomes its line in `metrics.jsonl`.

Shape legend: L layers, MTP modules among them, F fields of `LayerTraffic`.
"""

import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import distributed as dist
from torch.distributed import ProcessGroup

from comm.dispatch.traffic import LayerTraffic, TrafficSnapshot
from dualpipe.runtime.measured import RankBusyTime
from model.config import ModelConfig
from model.objective import BALANCE
from model.size import training_flops_per_token
from train.records.pictures import PipelineTimeline, bubble_of, pipeline_seconds, window_slots
from train.replica import Replica
from train.step import StepResult
from train.world import World

_FIELDS = tuple(each.name for each in fields(LayerTraffic))
_RECEIVED = _FIELDS.index("num_bytes_from_nodes")


def record_of(
    replica: Replica, watch: PipelineTimeline, done: int, result: StepResult, peak_flops: float | None
) -> dict[str, Any]:
    """Returns the record of step `done`, from 1. All ranks call it. `peak_flops` is that of each rank."""
    world = replica.world
    model = replica.config.model
    mesh = replica.world.layout.parallelism
    traffic = replica.observers.traffic.take()
    use = watch.use(replica, result.execution)
    with world.log.collective("world", world.groups.world, "sum of traffic"):
        clipped = replica.observers.clips.take()
        num_layers = model.num_layers + model.mtp_depth
        exchange = exchange_metrics(traffic, clipped, num_layers, world.groups.world, world.device)
    speed = result.tokens / result.seconds
    length = replica.config.batch.sequence_length_tokens
    losses = result.losses
    return {
        "step": done,
        "global_batch_sequences": replica.global_sequences,
        "loss": losses.total,
        "main_loss": losses.main,
        "mtp_loss": losses.mtp,
        "balance_loss": losses.by_name[BALANCE],
        **losses.reported,
        "grad_norm": result.grad_norm,
        "lr": result.rates.learning_rate,
        "mtp_loss_weight": result.rates.mtp_loss_weight,
        "bias_update_rate": result.rates.bias_update,
        "step_seconds": result.seconds,
        "tokens_per_second": speed,
        **mfu(model, length, speed, None if peak_flops is None else peak_flops * mesh.world_size),
        **_usage_metrics(world, use, result),
        **result.balance.metrics(),
        **({} if result.rollouts is None else {"rollouts": dict(result.rollouts)}),
        **exchange,
    }


def mfu(
    model: ModelConfig, sequence_length_tokens: int, tokens_per_second: float, peak_flops: float | None
) -> dict[str, float]:
    """Returns the model FLOPs utilization under the key `mfu`, or nothing if the peak is unknown.

    It counts the main model's forward and backward with causal attention halved, and no recomputation.
    """
    if peak_flops is None:
        return {}
    return {"mfu": training_flops_per_token(model, sequence_length_tokens) * tokens_per_second / peak_flops}


def _usage_metrics(world: World, use: RankBusyTime, result: StepResult) -> dict[str, object]:
    """Returns peak memory, the bubble and the parts of the step's time, over all ranks."""
    mesh = world.layout.parallelism
    mine = _peak_memory_bytes(world.device)
    sums = [use.busy_seconds, use.exposed_seconds, mine]
    used_seconds, exposed, memory = _reduce(world, sums, dist.ReduceOp.SUM)
    largest = [mine, *window_slots(use, world.layout.member_index(world.rank), mesh.stage_ranks)]
    peak, *slots = _reduce(world, largest, dist.ReduceOp.MAX)
    return {
        "peak_memory_bytes": int(peak),
        "mean_peak_memory_bytes": int(memory / mesh.world_size),
        "pipeline_bubble": bubble_of(used_seconds, slots, mesh.pipeline),
        "step_time": _step_time(
            result, used_seconds, exposed, pipeline_seconds(slots) * mesh.pipeline, mesh.world_size
        ),
    }


def _step_time(result: StepResult, used: float, exposed: float, pipelines: float, world_size: int) -> dict[str, float]:
    """Returns the parts of a step's time in seconds, means over all ranks.

    Together they are `step_seconds`. Those of rollouts and of earlier batches are rank 0's. Arguments are summed over
    all ranks.
    """
    bubble = max(pipelines - used, 0.0)
    known = result.update_seconds + (used + bubble) / world_size + sum(result.part_seconds.values())
    return {
        "compute_seconds": (used - exposed) / world_size,
        "exposed_exchange_seconds": exposed / world_size,
        "bubble_seconds": bubble / world_size,
        "optimizer_seconds": result.update_seconds,
        **{f"{part}_seconds": seconds for part, seconds in result.part_seconds.items()},
        "other_seconds": max(result.seconds - known, 0.0),
    }


def _reduce(world: World, values: Sequence[float], how: dist.ReduceOp.RedOpType) -> list[float]:
    reduced: list[float] = world.reduce(torch.tensor(values, dtype=torch.float64), "the step's record", how).tolist()
    return reduced


def _peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def exchange_metrics(
    traffic: TrafficSnapshot,
    clipped: Mapping[int | None, int],
    num_layers: int,
    world: ProcessGroup,
    device: torch.device,
) -> dict[str, object]:
    """Returns metrics of the traffic of all ranks in a step. All ranks call it.

    Returns totals of dispatch, combine and transfers, and under `exchange` an object for each layer that sent anything.
    NIC imbalance is the most bytes that a rank received from other nodes over the mean of the ranks that took part.
    """
    job = _gather_traffic(traffic, clipped, num_layers, world, device)
    whole = job.traffic
    received = job.traffic.total.num_bytes_from_nodes
    return {
        "nodes_per_token": whole.total.nodes_per_token or 1.0,
        "inter_node_bytes": whole.num_bytes_across_nodes,
        "intra_node_bytes": whole.num_bytes_within_node,
        "lower_bound_share": whole.total.lower_bound_share,
        "nic_imbalance": _imbalance(job.most_received[-1], received, dist.get_world_size(world)),
        "clipped_tokens": sum(job.clipped),
        "exchange": {
            f"layer_{layer}": _layer_metrics(counts)
            | {
                "nic_imbalance": _imbalance(job.most_received[layer], counts.num_bytes_from_nodes, job.holders[layer]),
                "clipped_tokens": job.clipped[layer],
            }
            for layer, counts in whole.layers.items()
            if layer is not None
        },
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class _JobTraffic:
    """Sums over all ranks, and the most bytes that one received from other nodes, by layer and in all."""

    traffic: TrafficSnapshot
    holders: list[int]
    clipped: list[int]
    most_received: list[float]


def _gather_traffic(
    traffic: TrafficSnapshot,
    clipped: Mapping[int | None, int],
    num_layers: int,
    world: ProcessGroup,
    device: torch.device,
) -> _JobTraffic:
    counts_LF = torch.zeros(num_layers, len(_FIELDS), dtype=torch.float64)
    held_L, clipped_L = torch.zeros(2, num_layers, dtype=torch.float64)
    for layer, counted in traffic.layers.items():
        assert layer is not None
        counts_LF[layer] = torch.tensor([getattr(counted, name) for name in _FIELDS], dtype=torch.float64)
        held_L[layer] = 1
    for layer, number in clipped.items():
        assert layer is not None
        clipped_L[layer] = number
    others = [
        traffic.num_message_bytes_within_node,
        traffic.num_message_bytes_across_nodes,
        traffic.num_context_bytes_within_node,
        traffic.num_context_bytes_across_nodes,
    ]
    messages = torch.tensor(others, dtype=torch.float64)
    received = counts_LF[:, _RECEIVED]
    largest = torch.cat([received, received.sum(0, keepdim=True)]).to(device)
    summed = torch.cat([counts_LF.flatten(), held_L, clipped_L, messages]).to(device)
    dist.all_reduce(summed, group=world)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=world)
    flat, *parts = summed.cpu().to(torch.int64).split([counts_LF.numel(), num_layers, num_layers, len(messages)])
    holders, clipped_of_all, (within, across, *context) = (each.tolist() for each in parts)
    rows = zip(flat.view(num_layers, len(_FIELDS)).tolist(), holders, strict=True)
    layers: dict[int | None, LayerTraffic] = {
        layer: LayerTraffic(**dict(zip(_FIELDS, row, strict=True))) for layer, (row, held) in enumerate(rows) if held
    }
    whole = TrafficSnapshot(
        layers=layers,
        num_message_bytes_within_node=within,
        num_message_bytes_across_nodes=across,
        num_context_bytes_within_node=context[0],
        num_context_bytes_across_nodes=context[1],
    )
    return _JobTraffic(traffic=whole, holders=holders, clipped=clipped_of_all, most_received=largest.tolist())


def _layer_metrics(counted: LayerTraffic) -> dict[str, object]:
    return {
        "rows_within_nodes": counted.num_rows_within_node,
        "rows_across_nodes": counted.num_rows_across_nodes,
        "bytes_within_nodes": counted.num_bytes_within_node,
        "bytes_across_nodes": counted.num_bytes_across_nodes,
        "predicted_rows_within_nodes": counted.predicted_rows_within_node,
        "predicted_rows_across_nodes": counted.predicted_rows_across_nodes,
        "predicted_bytes_within_nodes": counted.predicted_bytes_within_node,
        "predicted_bytes_across_nodes": counted.predicted_bytes_across_nodes,
        "nodes_per_token": counted.nodes_per_token,
        "lower_bound_share": counted.lower_bound_share,
    }


def _imbalance(most: float, total: float, num_ranks: float) -> float:
    return most * num_ranks / total if total else 1.0
