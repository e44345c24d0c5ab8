"""Formats a plan as lines of text of at most 100 columns. No torch here."""

from collections.abc import Iterator

from train.memory import memory_table, summary_line
from train.planner.cost import JobCost
from train.planner.job_plan import JobPlan
from train.planner.timing import TimedPlan


def plan_text(plan: JobPlan) -> str:
    """Returns a plan as text. The first line says whether the run fits, and names the largest rank.

    Args:
        plan: of a run.
    """
    lines = [_first_line(plan), *plan.reasons, "", *_layout_lines(plan), "", *memory_table(plan.memory)]
    if plan.timed is None or plan.cost is None:
        lines += ["", f"time: unknown: {plan.untimed}"]
    else:
        lines += ["", *_time_lines(plan.timed), "", *_cost_lines(plan.cost)]
    return "\n".join(lines)


def _first_line(plan: JobPlan) -> str:
    verdict = "fits" if plan.fits else "does not fit"
    if plan.config.cluster.memory_bytes is None:
        verdict = "memory of the devices is unknown"
    return f"{verdict}: {summary_line(plan.config, plan.memory).removeprefix('memory: ')}"


def _layout_lines(plan: JobPlan) -> Iterator[str]:
    config, mesh = plan.config, plan.config.parallelism
    yield f"model      {plan.parameters / 1e9:,.1f} billion weights, {plan.flops_per_token / 1e9:,.1f} GFLOP per token"
    yield (
        f"layout     {mesh.world_size:,} ranks: pipeline {mesh.pipeline} x data {mesh.data}, expert {mesh.expert}; "
        f"schedule {config.schedule.kind}"
    )
    yield (
        f"batch      {config.num_micro_batches} micro-batches of {config.batch.micro_sequences} x "
        f"{config.batch.sequence_length_tokens:,} tokens in each pipeline"
    )
    yield f"cut        {' '.join(map(str, mesh.cut.layers))}"


def _time_lines(timed: TimedPlan) -> Iterator[str]:
    time, parts = timed.time, timed.time.ranks[timed.time.busiest]
    mfu = "" if time.mfu is None else f", MFU {100 * time.mfu:.1f} %"
    yield f"step       {time.step:.3f} s, {time.tokens_per_second_per_gpu:,.0f} tokens/s per GPU{mfu}"
    yield (
        f"busiest    rank {time.busiest}: forward {parts.forward:.2f} s, backward {parts.backward:.2f} s, "
        f"weight {parts.weight:.2f} s, pairs {parts.pairs:.2f} s,"
    )
    yield (
        f"           bubble {parts.bubble:.2f} s, exposed exchange {time.exposed_exchange:.2f} s, "
        f"optimizer {time.optimizer:.2f} s"
    )
    factor = time.step / time.without_factor
    yield f"factor     {factor:.3f} for what no rate explains: {time.without_factor:.3f} s without it"


def _cost_lines(cost: JobCost) -> Iterator[str]:
    yield f"{'stage':<18}{'tokens':>16}{'GPU-hours':>14}{'dollars':>14}{'days':>10}{'kWh':>14}"
    for stage in cost.stages:
        tokens = "-" if stage.tokens is None else f"{stage.tokens / 1e9:,.1f}B"
        yield (
            f"{stage.name:<18}{tokens:>16}{stage.gpu_hours:>14,.0f}{_number(stage.dollars):>14}"
            f"{stage.days:>10,.1f}{_number(stage.kilowatt_hours):>14}"
        )
    yield (
        f"{'all':<18}{'':>16}{cost.gpu_hours:>14,.0f}{_number(cost.dollars):>14}"
        f"{sum(stage.days for stage in cost.stages):>10,.1f}{_number(cost.kilowatt_hours):>14}"
    )
    yield f"per trillion tokens: {cost.gpu_hours_per_trillion_tokens:,.0f} GPU-hours"
    if cost.goodput is not None:
        yield f"goodput: {100 * cost.goodput.share:.1f} %, one failure in {cost.goodput.job_mtbf_hours:,.1f} h"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"
