"""Converts plans to the public JSON form, whose keys are spelled `optimiser_*`. No torch here."""

from collections.abc import Iterator, Sequence
from typing import Any

from train.config import TrainConfig
from train.config.decode import encode
from train.memory import RankMemory
from train.planner.advice import AdviceRow, LinkBalance, WhatIf, Wish
from train.planner.job_plan import JobCost, JobPlan, PlannerConfig, layout_json
from train.planner.search import FoundLayout, SearchResult
from train.schedule.timing import TimedPlan


def plan_values(plan: JobPlan, planner: PlannerConfig) -> dict[str, Any]:
    """Returns a plan as plain values."""
    return {
        "model": {"parameters": plan.parameters, "flops_per_token": plan.flops_per_token},
        "layout": layout_json(plan.config),
        "fits": plan.fits,
        "reasons": list(plan.reasons),
        "memory": {
            "capacity_bytes": plan.config.cluster.memory_bytes,
            "peak_bytes": plan.memory.worst.total,
            "ranks": [_rank_values(rank) for rank in plan.memory.ranks],
        },
        "time": None if plan.timed is None else _time_values(plan.timed),
        "time_unknown": plan.untimed or None,
        "cost": None if plan.cost is None else _cost_values(plan.cost),
        "assumptions": [encode(assumption) for assumption in plan.assumptions],
        "rates": encode(planner.rates),
        "efficiency": encode(planner.efficiency),
    }


def _rank_values(rank: RankMemory) -> dict[str, Any]:
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


def _time_values(timed: TimedPlan) -> dict[str, Any]:
    """Returns the time of a step. Parts are those of the busiest rank without the declared factor."""
    time = timed.time
    ranks = [{f"{name}_seconds": seconds for name, seconds in encode(parts).items()} for parts in time.ranks]
    return {
        "step_seconds": time.step,
        "step_seconds_without_factor": time.without_factor,
        "tokens_per_second_per_gpu": time.tokens_per_second_per_gpu,
        "mfu": time.mfu,
        "bubble_seconds": time.bubble,
        "exposed_exchange_seconds": time.exposed_exchange,
        "optimiser_seconds": time.optimizer,
        "busiest_rank": time.busiest,
        "parts": ranks[time.busiest],
        "ranks": [{"pipeline_rank": rank, **parts} for rank, parts in enumerate(ranks)],
    }


def _cost_values(cost: JobCost) -> dict[str, Any]:
    return {
        "gpu_hours_per_trillion_tokens": cost.gpu_hours_per_trillion_tokens,
        "gpu_hours": cost.gpu_hours,
        "dollars": cost.dollars,
        "kilowatt_hours": cost.kilowatt_hours,
        "goodput": None if cost.goodput is None else encode(cost.goodput),
        "stages": [encode(stage) for stage in cost.stages],
    }


def what_if_values(what_if: WhatIf) -> dict[str, Any]:
    """Returns a what-if as plain values."""
    plan = what_if.plan
    time = None if plan.timed is None else plan.timed.time
    cost = plan.cost
    return {
        "change": what_if.change,
        "step_seconds": None if time is None else time.step,
        "speedup": what_if.speedup,
        "gain": what_if.gain,
        "tokens_per_second_per_gpu": None if time is None else time.tokens_per_second_per_gpu,
        "mfu": None if time is None else time.mfu,
        "gpu_hours": None if cost is None else cost.gpu_hours,
        "gpu_hours_per_trillion_tokens": None if cost is None else cost.gpu_hours_per_trillion_tokens,
        "dollars": None if cost is None else cost.dollars,
        "fits": plan.fits,
        "peak_bytes": plan.memory.worst.total,
        "capacity_bytes": plan.config.cluster.memory_bytes,
        "time_unknown": plan.untimed or None,
    }


def advice_values(rows: Sequence[AdviceRow], unknown: Sequence[Wish], balance: LinkBalance) -> dict[str, Any]:
    """Returns hardware advice as plain values, computed wishes sorted by gain."""
    values = [
        {
            "wish": row.wish.name,
            **(known := what_if_values(row.what_if)),
            "fits": known["fits"] if row.wish.has_memory and known["capacity_bytes"] is not None else None,
            "note": row.wish.note or None,
        }
        for row in rows
    ]
    return {
        "rows": sorted(values, key=lambda row: (row["gain"] is None, -(row["gain"] or 0.0))),
        "unknown": [{"wish": wish.name, "needs": wish.needs} for wish in unknown],
        **encode(balance),
    }


def search_values(result: SearchResult) -> dict[str, Any]:
    """Returns the result of a search as plain values."""
    return {
        "candidates": [_found_values(layout, result.run) for layout in result.found],
        "rejected": [
            {"layout": group.layout, "reason": group.reason, "count": group.count} for group in result.rejected
        ],
        "counts": encode(result.counts),
    }


def _found_values(layout: FoundLayout, run: TrainConfig) -> dict[str, Any]:
    time = layout.time
    return {
        "layout": layout_json(layout.config),
        "memory": {"peak_bytes": layout.peak_bytes},
        "time": {
            "step_seconds": time.step,
            "tokens_per_second_per_gpu": time.tokens_per_second_per_gpu,
            "mfu": time.mfu,
        },
        "cost": None if layout.cost is None else _cost_values(layout.cost),
        "pareto": layout.is_pareto,
        "overrides": list(_overrides(layout.config, run)),
    }


def _overrides(config: TrainConfig, run: TrainConfig) -> Iterator[str]:
    """Yields the overrides that turn a run into a layout with a listed cut."""
    mesh = config.parallelism
    batch = config.batch
    schedule = config.schedule
    yield f"parallelism.pipeline={mesh.pipeline}"
    yield f"parallelism.data={mesh.data}"
    yield f"parallelism.expert={mesh.expert}"
    if mesh.context != run.parallelism.context:
        yield f"parallelism.context={mesh.context}"
    yield f"parallelism.cut=[{','.join(map(str, mesh.cut.layers))}]"
    yield f"schedule={schedule.kind}"
    yield f"schedule.pairing={schedule.pairing}"
    yield f"batch.micro_sequences={batch.micro_sequences}"
    if batch.global_sequences != run.batch.global_sequences:
        yield f"batch.global_sequences={batch.global_sequences}"
        yield f"task.steps={config.task.steps}"
        yield f"validation.sequences={config.validation.sequences}"
    if batch.ramp != run.batch.ramp:
        yield "batch.ramp=null"
    if config.precision != run.precision:
        yield f"precision={config.precision.kind}"
    if config.recompute != run.recompute:
        yield f"recompute=[{','.join(config.recompute)}]"
    if config.dispatch != run.dispatch:
        yield f"dispatch={config.dispatch.kind}"
        yield f"dispatch.payload={config.dispatch.payload}"
