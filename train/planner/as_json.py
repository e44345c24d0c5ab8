"""Converts plans to the public JSON form. No torch here.

Keys of bytes and seconds that end in `optimiser_*` keep the spelling of the published interface.
"""

from typing import Any

from train.config import TrainConfig
from train.config.decode import encode
from train.memory import RankMemory
from train.planner.cost import JobCost
from train.planner.job_plan import JobPlan, PlannerConfig
from train.planner.timing import TimedPlan


def plan_json(plan: JobPlan, planner: PlannerConfig) -> dict[str, Any]:
    """Returns a plan as plain values.

    Args:
        planner: what it was computed from; `rates=FILE` reads it back.
    """
    return {
        "model": {"parameters": plan.parameters, "flops_per_token": plan.flops_per_token},
        "layout": layout_json(plan.config),
        "fits": plan.fits,
        "reasons": list(plan.reasons),
        "memory": {
            "capacity_bytes": plan.config.cluster.memory_bytes,
            "peak_bytes": plan.memory.worst.total,
            "ranks": [rank_json(rank) for rank in plan.memory.ranks],
        },
        "time": None if plan.timed is None else time_json(plan.timed),
        "time_unknown": plan.untimed or None,
        "cost": None if plan.cost is None else cost_json(plan.cost),
        "assumptions": [encode(assumption) for assumption in plan.assumptions],
        "rates": encode(planner.rates),
        "efficiency": encode(planner.efficiency),
    }


def layout_json(config: TrainConfig) -> dict[str, Any]:
    """Returns the layout of a run with a listed cut."""
    mesh = config.parallelism
    return {
        "ranks": mesh.world_size,
        "pipeline": mesh.pipeline,
        "data": mesh.data,
        "context": mesh.context,
        "expert": mesh.expert,
        "schedule": config.schedule.kind,
        "chunks": len(mesh.cut.layers) // mesh.pipeline,
        "num_micro_batches": config.num_micro_batches,
        "micro_batch_sequences": config.batch.micro_sequences,
        "cut": list(mesh.cut.layers),
        "recompute": list(config.recompute),
        "precision": config.precision.kind,
        "dispatch": config.dispatch.kind,
    }


def rank_json(rank: RankMemory) -> dict[str, Any]:
    """Returns the memory of a rank. All bytes but the total add up to the total."""
    is_reducing = rank.reducing > rank.passes
    passes = rank.cool_down if is_reducing else rank.pipeline
    buffers = rank.weight_codes + passes.exchange + passes.transfers + passes.inside + rank.reserve
    return {
        "pipeline_rank": rank.pipeline_rank,
        "parameters": rank.parameters,
        "weights_bytes": rank.weights,
        "gradients_bytes": rank.gradients,
        "optimiser_bytes": rank.optimizer,
        "activations_bytes": passes.activations + passes.pending + rank.batch,
        "buffers_bytes": buffers + (rank.update if is_reducing else 0),
        "total_bytes": rank.total,
    }


def time_json(timed: TimedPlan) -> dict[str, Any]:
    """Returns the time of a step. Parts are those of the busiest rank without the declared factor."""
    time, busiest = timed.time, timed.time.ranks[timed.time.busiest]
    return {
        "step_seconds": time.step,
        "step_seconds_without_factor": time.without_factor,
        "tokens_per_second_per_gpu": time.tokens_per_second_per_gpu,
        "mfu": time.mfu,
        "bubble_seconds": time.bubble,
        "exposed_exchange_seconds": time.exposed_exchange,
        "optimiser_seconds": time.optimizer,
        "busiest_rank": time.busiest,
        "parts": _parts_json(busiest),
        "ranks": [{"pipeline_rank": rank, **_parts_json(parts)} for rank, parts in enumerate(time.ranks)],
    }


def _parts_json(parts: object) -> dict[str, float]:
    return {f"{name}_seconds": seconds for name, seconds in encode(parts).items()}


def cost_json(cost: JobCost) -> dict[str, Any]:
    """Returns the cost of all stages."""
    return {
        "gpu_hours_per_trillion_tokens": cost.gpu_hours_per_trillion_tokens,
        "gpu_hours": cost.gpu_hours,
        "dollars": cost.dollars,
        "kilowatt_hours": cost.kilowatt_hours,
        "goodput": None if cost.goodput is None else encode(cost.goodput),
        "stages": [encode(stage) for stage in cost.stages],
    }
