"""Compares a changed run with the run itself. No torch here."""

from dataclasses import dataclass, replace

from dualpipe.ir import Schedule
from train.config import TrainConfig
from train.planner.job_plan import JobPlan, PlannerConfig, plan_job


@dataclass(frozen=True, kw_only=True, slots=True)
class WhatIf:
    """A changed run next to the run itself.

    Attributes:
        change: as the user writes it.
        plan: of the changed run.
        speedup: tokens per second over those of the run; None if the time of either is unknown.
        gain: share of tokens that a GPU-hour trains more than in the run, failures included; None as for `speedup`.
    """

    change: str
    plan: JobPlan
    speedup: float | None
    gain: float | None


def compare(change: str, base: JobPlan, changed: JobPlan) -> WhatIf:
    """Returns a changed run next to the run itself.

    Args:
        change: as the user writes it.
        changed: plan of the changed run.
    """
    speedup = gain = None
    if base.timed is not None and changed.timed is not None and base.cost is not None and changed.cost is not None:
        tokens = [
            plan.timed.time.tokens_per_second_per_gpu * plan.config.parallelism.world_size
            for plan in (base, changed)
            if plan.timed is not None
        ]
        speedup = tokens[1] / tokens[0]
        gain = base.cost.gpu_hours_per_trillion_tokens / changed.cost.gpu_hours_per_trillion_tokens - 1
    return WhatIf(change=change, plan=changed, speedup=speedup, gain=gain)


def plan_kept(base: JobPlan, before: TrainConfig, after: TrainConfig, planner: PlannerConfig) -> JobPlan | None:
    """Plans a changed run with the order and the cut of the run, or returns None if they do not apply.

    Args:
        before: configuration of the run, before its cut was chosen.

    Raises:
        ScheduleError, CutError: as `plan_job`.
    """
    if base.timed is None or _order_inputs(before) != _order_inputs(after):
        return None
    order: Schedule = base.timed.schedule
    parallelism = replace(after.parallelism, cut=base.config.parallelism.cut)
    schedule = replace(after.schedule, kind=base.config.schedule.kind)
    return plan_job(replace(after, parallelism=parallelism, schedule=schedule), planner, order)


def _order_inputs(config: TrainConfig) -> tuple[object, ...]:
    """Returns what decides, with the costs, on the order and the cut of a run."""
    mesh, model = config.parallelism, config.model
    sizes = (mesh.pipeline, mesh.cut, config.num_micro_batches, model.num_layers, model.num_dense_layers)
    return (*sizes, model.mtp_depth, config.schedule, config.memory_cap, config.costs)
