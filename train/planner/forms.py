"""Converts plans to their public JSON form, and formats it as text. No torch here.

Keys of the JSON form are spelled `optimiser_*`. All but the memory of a plan is formatted from it.
"""

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from train.config.decode import encode
from train.memory import RankMemory
from train.memory.fit import gigabytes, parts
from train.planner.advice import AdviceRow, LinkBalance, WhatIf, Wish
from train.planner.job_plan import JobCost, JobPlan, PlannerConfig, layout_json
from train.planner.scaling import shape_distance
from train.report.plan_comparison import COMPARED_HEADER, comparison_notes, comparison_rows
from train.schedule.timing import TimedPlan

COLUMNS = 100
INDENT = 11
_NAME = 57
_GB = 1e9
_MB = 1e6
_MEMORY_COLUMNS = (
    *("ranks", "weights", "gradients", "optimizer", "activations", "pending W", "buffers", "reserve", "total", "used"),
)
_UNIT_GAP = re.compile(r"(?<=\d) (?=(?:s|GB|MB|%|GPU-hours)\b|%)")


def plan_values(plan: JobPlan, planner: PlannerConfig) -> dict[str, Any]:
    """Returns a plan as plain values."""
    shape = None if plan.timed is None else shape_distance(plan.config, planner.rates)
    return {
        "summary": [_first_line(plan), *_layout_texts(plan).values()],
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
        "shape": shape,
        "time_unknown": plan.untimed or None,
        "rollouts": encode(plan.rollouts),
        "cost": None if plan.cost is None else cost_values(plan.cost),
        "assumptions": [encode(assumption) for assumption in plan.assumptions],
        "rates": encode(planner.rates),
        "efficiency": encode(planner.efficiency),
    }


def _rank_values(rank: RankMemory) -> dict[str, Any]:
    """Returns the memory of a rank. All bytes but the total add up to the total."""
    *static, activations, pending, buffers, reserve, total = _peak_parts(rank)
    return {
        "pipeline_rank": rank.pipeline_rank,
        "parameters": rank.parameters,
        **dict(zip(("weights_bytes", "gradients_bytes", "optimiser_bytes"), static, strict=True)),
        "activations_bytes": activations + pending,
        "buffers_bytes": buffers + reserve,
        "total_bytes": total,
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


def cost_values(cost: JobCost) -> dict[str, Any]:
    """Returns the cost of a run as plain values."""
    sums = {key: getattr(cost, key) for key in ("gpu_hours", "dollars", "kilowatt_hours")}
    return {**encode(cost), **sums}


def what_if_values(what_if: WhatIf) -> dict[str, Any]:
    """Returns a what-if as plain values."""
    plan = what_if.plan
    time = {} if plan.timed is None else _time_values(plan.timed)
    cost = {} if plan.cost is None else cost_values(plan.cost)
    return {
        "change": what_if.change,
        "speedup": what_if.speedup,
        "gain": what_if.gain,
        **{key: time.get(key) for key in ("step_seconds", "tokens_per_second_per_gpu", "mfu")},
        **{key: cost.get(key) for key in ("gpu_hours", "gpu_hours_per_trillion_tokens", "dollars")},
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
            **(changes := what_if_values(row.what_if)),
            "fits": changes["fits"] if row.wish.has_memory and changes["capacity_bytes"] is not None else None,
            "note": row.wish.note or None,
        }
        for row in rows
    ]
    return {
        "rows": sorted(values, key=lambda row: (row["gain"] is None, -(row["gain"] or 0.0))),
        "unknown": [{"wish": need.name, "needs": need.needs} for need in unknown],
        **encode(balance),
    }


def plan_text(plan: JobPlan, values: Mapping[str, Any]) -> list[str]:
    """Returns a plan as lines. The first says whether the run fits, and names the largest rank."""
    layout = [line for label, text in _layout_texts(plan).items() for line in labeled(label, text)]
    lines = [_first_line(plan), *_reason_lines(plan), "", *layout, "", *_memory_lines(plan), ""]
    if values["time"] is None:
        return [*lines, *labeled("time", f"unknown: {plan.untimed}")]
    lines += [
        *_time_lines(values["time"], values["shape"], samples=bool(values["rollouts"])),
        *_rollout_lines(values["rollouts"]),
        "",
    ]
    lines += _cost_lines(values["cost"])
    number = len(values["assumptions"])
    sources = f"format=json and format=html list {number} values behind these figures, with their sources"
    return [*lines, "", *labeled("sources", sources)]


def labeled(label: str, text: str) -> list[str]:
    """Returns lines that start with a label, and continue below its text, which has no line breaks."""
    # A number stays in the line of its unit: textwrap does not break at a no-break space.
    joined = _UNIT_GAP.sub("\N{NO-BREAK SPACE}", text)
    lines = wrapped(joined, first=f"{label:<{INDENT}}", others=" " * INDENT)
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines]


def wrapped(text: str, *, first: str = "", others: str = "") -> list[str]:
    """Returns the lines of a text of any length."""
    return textwrap.wrap(text, COLUMNS, initial_indent=first, subsequent_indent=others, break_on_hyphens=False)


def aligned(rows: Sequence[Sequence[str]], gap: str = "  ") -> list[str]:
    """Returns the rows of a table as lines; all columns are aligned on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [gap.join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _first_line(plan: JobPlan) -> str:
    room = plan.config.cluster.memory_bytes
    worst = plan.memory.worst
    needs = f"the largest rank, {worst.pipeline_rank}, needs {gigabytes(worst.total)}"
    if room is None:
        return f"{needs}; cluster.memory_bytes, the memory of a device, is not given"
    return f"{'fits' if plan.fits else 'does not fit'}: {needs} of {gigabytes(room)}"


def _reason_lines(plan: JobPlan) -> list[str]:
    """Returns the parts of the largest rank, or why the run does not fit and what would."""
    if plan.fits:
        return labeled("largest", f"{parts(plan.memory.worst)}, in GB unless MB is given")
    return [line for reason in plan.reasons for line in labeled("reason", reason)]


def _layout_texts(plan: JobPlan) -> dict[str, str]:
    """Returns what is planned, by label."""
    config = plan.config
    batch = plan.config.batch
    mesh = plan.config.parallelism
    unit, name = (1e9, "billion") if plan.parameters >= 1e9 else (1e6, "million")
    flops, prefix = (1e9, "G") if plan.flops_per_token >= 1e9 else (1e6, "M")
    return {
        "model": f"{plan.parameters / unit:,.1f} {name} weights, {plan.flops_per_token / flops:,.1f} {prefix}FLOP per "
        f"trained token, {config.precision.kind}",
        "layout": f"{mesh.world_size:,} ranks: {mesh.axes()}, experts over {mesh.expert}; "
        f"schedule {config.schedule.kind}, dispatch {config.dispatch.kind}",
        "batch": f"{batch.global_sequences:,} sequences of {batch.sequence_length_tokens:,} tokens: in each pipeline "
        f"{config.num_micro_batches} micro-batches of {batch.micro_sequences}",
        "cut": f"{' '.join(map(str, mesh.cut.layers))} layers in the stages",
    }


def _memory_lines(plan: JobPlan) -> list[str]:
    """Returns a table of the ranks' memory at its peak; neighbors of the same sizes share a line."""
    worst = plan.memory.worst
    room = plan.config.cluster.memory_bytes
    unit, name = (_GB, "GB") if worst.total >= _GB else (_MB, "MB")
    rows = [list(_MEMORY_COLUMNS if room is not None else _MEMORY_COLUMNS[:-1])]
    for cells, group in groupby(plan.memory.ranks, key=lambda rank: [_size(size, unit) for size in _peak_parts(rank)]):
        ranks = list(group)
        first = ranks[0].pipeline_rank
        last = ranks[-1].pipeline_rank
        used = [] if room is None else [f"{100 * ranks[0].total / room:.0f} %"]
        rows.append([str(first) if first == last else f"{first}-{last}", *cells, *used])
    return [f"memory of the pipeline ranks at their peak, in {name}", *aligned(rows)]


def _peak_parts(rank: RankMemory) -> tuple[int, ...]:
    """Returns the bytes of a rank in the order of the columns. All but the last add up to the last."""
    is_reducing = rank.reducing > rank.passes
    passes = rank.cool_down if is_reducing else rank.pipeline
    buffers = rank.weight_codes + passes.exchange + passes.transfers + passes.inside
    buffers += rank.update if is_reducing else 0
    static = (rank.weights, rank.gradients, rank.optimizer)
    return (*static, passes.activations + rank.batch, passes.pending, buffers, rank.reserve, rank.total)


def _size(size: int, unit: float) -> str:
    """Returns a size for a column; what a column of GB would round to nothing is in MB."""
    if unit == _GB and 0 < size < 0.1 * _GB:
        return f"{size / _MB:.1f} MB"
    return f"{size / unit:.1f}" if size else "0"


def _time_lines(time: Mapping[str, Any], shape: Mapping[str, Any] | None, *, samples: bool) -> Iterator[str]:
    step = time["step_seconds"]
    without = time["step_seconds_without_factor"]
    spent = time["parts"]
    mfu = "" if time["mfu"] is None else f", MFU {100 * time['mfu']:.1f} %"
    bar = "" if shape is None else f" +- {step * shape['error']:.2g} s ({100 * shape['error']:.0f} %)"
    if shape is not None and samples:
        bar = f" (+- {100 * shape['error']:.0f} % without its sampling)"
    yield from labeled("step", f"{step:.3f} s{bar}, {time['tokens_per_second_per_gpu']:,.0f} tokens/s per GPU{mfu}")
    if shape is not None:
        rows = f"{shape['expert_rows']:,.0f} rows per expert, rates measured with {shape['measured_rows']:,}"
        times = f"a layer computes {shape['slowdown']:.2f} times as long as at the measured rate"
        yield from labeled("shape", f"{rows}; for its sizes, {times}")
    if step != without:
        yield from labeled(
            "factor",
            f"{without:.3f} s from the rates, x {step / without:.3f} for what no rate explains "
            "(efficiency.unexplained)",
        )
    yield from labeled(
        "busiest",
        f"rank {time['busiest_rank']}, without the factor: F {spent['forward_seconds']:.2f} s, "
        f"B {spent['backward_seconds']:.2f} s, W {spent['weight_seconds']:.2f} s, "
        f"F with B {spent['pairs_seconds']:.2f} s, bubble {spent['bubble_seconds']:.2f} s, "
        f"optimizer {time['optimiser_seconds']:.2f} s; {time['exposed_exchange_seconds']:.2f} s of it are exchange "
        "that nothing hides",
    )


def _rollout_lines(rollouts: Mapping[str, Any] | None) -> Iterator[str]:
    if rollouts is None:
        return
    cohorts = f"{rollouts['cohorts']} cohorts" if rollouts["cohorts"] > 1 else "1 cohort"
    speed = "unknown"
    if rollouts["sampling_seconds"] is not None:
        speed = (
            f"{_hours(rollouts['sampling_seconds'])} s, {rollouts['tokens_per_second_per_gpu']:,.1f} tokens/s per GPU, "
            f"ranks idle {100 * rollouts['idle_share']:.0f} %"
        )
    yield from labeled(
        "sampling",
        f"{speed}; {rollouts['rounds']:,} rounds of {cohorts} of at most {rollouts['max_rows']} rows for each "
        f"direction, {rollouts['rows_per_visit']:.1f} rows per visit; a rank's caches "
        f"{gigabytes(rollouts['cache_bytes'])}",
    )
    yield from labeled(
        "answers",
        f"{rollouts['answers']:,}, {rollouts['mean_tokens']:,.0f} tokens in the mean, {rollouts['most_tokens']:,} at "
        f"most; batches trained for an update: {rollouts['batches']}; passes of the reference "
        f"{rollouts['reference_seconds']:.2f} s a batch, of reward models {rollouts['reward_seconds']:.2f} s",
    )
    for note in rollouts["notes"]:
        yield from labeled("note", note)


def _cost_lines(cost: Mapping[str, Any]) -> Iterator[str]:
    stages = cost["stages"]
    yield f"{'stage':<18}{'billion tokens':>16}{'GPU-hours':>14}{'dollars':>14}{'days':>10}{'kWh':>14}"
    all_stages = {**cost, "name": "all", "days": sum(stage["days"] for stage in stages)}
    for stage in [*stages, all_stages] if len(stages) > 1 else stages:
        tokens = "" if stage is all_stages else _number(stage["tokens"], 1e9, 1)
        yield (
            f"{stage['name']:<18}{tokens:>16}{_hours(stage['gpu_hours']):>14}{_number(stage['dollars']):>14}"
            f"{stage['days']:>10,.1f}{_number(stage['kilowatt_hours']):>14}"
        )
    yield from labeled("price", f"{cost['gpu_hours_per_trillion_tokens']:,.0f} GPU-hours for a trillion tokens")
    for stage in stages[1:]:
        yield from labeled("note", f"{stage['name']}: {stage['note']}")
    if (goodput := cost["goodput"]) is not None:
        failures = f"the job fails once in {goodput['job_mtbf_hours']:,.1f} h"
        yield from labeled("goodput", f"{100 * goodput['share']:.1f} %, included above: {failures}")


def _hours(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:,.2f}"


def _number(value: float | None, unit: float = 1.0, digits: int = 0) -> str:
    return "-" if value is None else f"{value / unit:,.{digits}f}"


def what_if_text(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns a table of what-ifs in their order, or nothing if there are none."""
    lines = [line for row in rows for line in _changed_lines(row["change"], row, _number(row["speedup"], digits=3))]
    return [_changed_line("what if", "step s", "speedup", "GPU-hours", "fits"), *lines] if rows else []


def advice_text(advice: Mapping[str, Any]) -> Iterator[str]:
    """Yields hardware advice: the balance, a table of computed wishes, and unknown wishes."""
    yield from _balance_lines(advice)
    yield ""
    yield _changed_line("hardware", "step s", "gain", "GPU-hours", "fits")
    for row in advice["rows"]:
        # Without the sign of a rounded zero.
        gain = "-" if row["gain"] is None else f"{round(100 * row['gain'], 1) + 0.0:+.1f} %"
        yield from _changed_lines(row["wish"], row, gain)
        note = f"   ({row['note']})" if row["note"] else ""
        yield from wrapped(f"{row['change']}{note}", first="  ", others="    ")
    yield ""
    yield "not computed, with what would have to be known:"
    for unknown in advice["unknown"]:
        yield from wrapped(f"{unknown['wish']}: {unknown['needs']}", first="  ", others="    ")


def _balance_lines(advice: Mapping[str, Any]) -> Iterator[str]:
    exchange = 1e3 * advice["exchange_seconds_per_layer"]
    compute = 1e3 * advice["compute_seconds_per_layer"]
    yield (
        f"balance    a MoE layer's F and B: exchange {exchange:.2f} ms, computation {compute:.2f} ms: "
        f"{advice['exchange_over_compute']:.2f}; hidden: {advice['hidden']}"
    )
    link = advice["inter_node_bytes_per_second"]
    even = advice["break_even_bytes_per_second"]
    if link is None:
        yield "break-even unknown; cluster.inter_node_bytes_per_second is null"
    elif even is None:
        yield f"break-even none for the link between nodes; the exchange is limited by: {advice['limit']}"
    else:
        side = f"{link / even:.2f} x faster" if link >= even else f"{even / link:.2f} x slower"
        yield f"break-even {even / 1e9:.1f} GB/s between nodes: below it, exchange is longer than computation;"
        yield f"           the link has {link / 1e9:.1f} GB/s, {side}; the exchange is limited by: {advice['limit']}"


def _changed_lines(name: str, row: Mapping[str, Any], change: str) -> Iterator[str]:
    """Yields the row of a changed run; a long name takes several lines."""
    is_unknown = row["fits"] is None or row["capacity_bytes"] is None
    verdict = "-" if is_unknown else "yes" if row["fits"] else "no"
    hours = "-" if row["gpu_hours"] is None else _hours(row["gpu_hours"])
    *above, last = textwrap.wrap(name, _NAME, subsequent_indent="  ", break_on_hyphens=False)
    yield from above
    yield _changed_line(last, _number(row["step_seconds"], digits=3), change, hours, verdict)


def _changed_line(name: str, step: str, change: str, hours: str, fits: str) -> str:
    return f"{name:<{_NAME}}{step:>12}{change:>10}{hours:>14}{fits:>7}"


def comparison_text(compared: Mapping[str, Any]) -> list[str]:
    """Returns a comparison of plan and run as lines."""
    return [
        f"compared with {compared['num_steps']:,} steps of the run, medians over steps and means over ranks:",
        *(
            f"{name:<22}{predicted:>12}{measured:>12}{factor:>22}"
            for name, predicted, measured, factor in (COMPARED_HEADER, *comparison_rows(compared))
        ),
        *comparison_notes(compared),
    ]


def built_text(kinds: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns a table of built ranks."""
    rows = [["built ranks", "parameters", "weights (B)", "gradients (B)", "optimizer (B)", "arithmetic"]]
    for kind in kinds:
        ranks = kind["pipeline_ranks"]
        rank_list = ",".join(map(str, ranks))
        name = rank_list if len(rank_list) <= 24 else f"{ranks[0]}..{ranks[-1]} ({len(ranks)})"
        sizes = (kind[key] for key in ("parameters", "weights_bytes", "gradients_bytes", "optimiser_bytes"))
        rows.append([name, *(f"{size:,}" for size in sizes), "equal" if kind["equal"] else "differs"])
    return aligned(rows)
