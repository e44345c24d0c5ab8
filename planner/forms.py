"""Converts plans to their public JSON form, and formats it as text. No torch here.

Keys of the JSON form are spelled `optimiser_*`. All but the memory of a plan is formatted from it.
"""

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from base.decode import encode
from base.figures import aligned
from comm.config import DeepEPDispatchConfig, TwoHopDispatchConfig
from model.size import count_parameters, training_flops_per_token
from planner.job_plan import JobPlan, PlannerConfig, layout_json
from planner.scaling import shape_distance
from train.config import TrainConfig
from train.predict.fit import gigabytes, parts
from train.predict.memory import RankMemory
from train.predict.timing import TimedPlan
from train.report.plan_comparison import COMPARED_HEADER, comparison_notes, comparison_rows

COLUMNS = 100
INDENT = 11
_NAME = 57
_GB = 1e9
_MB = 1e6
_MEMORY_COLUMNS = (
    *("ranks", "weights", "gradients", "optimizer", "activations", "pending W", "buffers", "reserve", "total", "used"),
)
_SHAPE = (
    "{expert_rows:,.0f} rows per expert, rates measured with {measured_rows:,}; for its sizes, a layer computes "
    "{slowdown:.2f} times as long as at the measured rate"
)
_BUSIEST = (
    "rank {busiest_rank}, without the factor: F {forward_seconds:.2f} s, B {backward_seconds:.2f} s, "
    "W {weight_seconds:.2f} s, F with B {pairs_seconds:.2f} s, bubble {bubble_seconds:.2f} s, optimizer "
    "{optimiser_seconds:.2f} s; {exposed_exchange_seconds:.2f} s of it are exchange that nothing hides"
)
_SAMPLING = (
    "{speed}; {rounds:,} rounds of {cohorts} cohort{several} of at most {max_rows} rows for each direction, "
    "{rows_per_visit:.1f} rows per visit; a rank's caches {caches}"
)
_ANSWERS = (
    "{answers:,}, {mean_tokens:,.0f} tokens in the mean, {most_tokens:,} at most; batches trained for an update: "
    "{batches}; passes of the reference {reference_seconds:.2f} s a batch, of reward models {reward_seconds:.2f} s"
)
_BALANCE = (
    "balance    a MoE layer's F and B: exchange {exchange:.2f} ms, computation {compute:.2f} ms: "
    "{exchange_over_compute:.2f}; hidden: {hidden}"
)
_UNIT_GAP = re.compile(r"(?<=\d) (?=(?:s|GB|MB|%|GPU-hours)\b|%)")


def plan_values(plan: JobPlan, planner: PlannerConfig) -> dict[str, Any]:
    """Returns a plan as plain values."""
    return {
        "summary": [_first_line(plan), *_layout_texts(plan).values()],
        "model": _model_values(plan),
        "layout": layout_json(plan.config),
        "fits": plan.fits,
        "reasons": [plan.reason] if plan.reason else [],
        "memory": {
            "capacity_bytes": plan.config.cluster.memory_bytes,
            "peak_bytes": plan.memory.worst.total,
            "ranks": [_rank_values(rank) for rank in plan.memory.ranks],
        },
        "time": None if plan.timed is None else _time_values(plan.timed),
        "shape": None if plan.timed is None else shape_distance(plan.config, planner.rates),
        "slices": {str(number): seconds for number, seconds in plan.slices.items()},
        "time_unknown": plan.untimed or None,
        "rollouts": encode(plan.rollouts),
        "cost": plan.cost,
        "assumptions": list(plan.assumptions),
        "rates": encode(planner.rates),
        "efficiency": encode(planner.efficiency),
    }


def _model_values(plan: JobPlan) -> dict[str, Any]:
    model = plan.config.model
    flops = training_flops_per_token(model, plan.config.batch.sequence_length_tokens)
    return {"parameters": count_parameters(model).total, "flops_per_token": flops}


def _rank_values(rank: RankMemory) -> dict[str, Any]:
    """Returns the memory of a rank. All bytes but the total add up to the total."""
    *static, activations, pending, buffers, reserve = _peak_parts(rank)
    return {
        "pipeline_rank": rank.pipeline_rank,
        "parameters": rank.parameters,
        **dict(zip(("weights_bytes", "gradients_bytes", "optimiser_bytes"), static, strict=True)),
        "activations_bytes": activations + pending,
        "buffers_bytes": buffers + reserve,
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


def what_if_values(change: str, base: JobPlan, plan: JobPlan, note: str | None = None) -> dict[str, Any]:
    """Returns a changed run next to the run itself as plain values; gains are None if a time is unknown."""
    time = {} if plan.timed is None else _time_values(plan.timed)
    cost = plan.cost or {}
    speedup = gain = None
    if base.timed is not None and base.cost is not None and time and cost:
        per_gpu = time["tokens_per_second_per_gpu"]
        before = base.timed.time.tokens_per_second_per_gpu * base.config.parallelism.world_size
        speedup = per_gpu * plan.config.parallelism.world_size / before
        gain = base.cost["gpu_hours_per_trillion_tokens"] / cost["gpu_hours_per_trillion_tokens"] - 1
    return {
        "change": change,
        "speedup": speedup,
        "gain": gain,
        **{key: time.get(key) for key in ("step_seconds", "tokens_per_second_per_gpu", "mfu")},
        **{key: cost.get(key) for key in ("gpu_hours", "gpu_hours_per_trillion_tokens", "dollars")},
        "fits": plan.fits,
        "peak_bytes": plan.memory.worst.total,
        "capacity_bytes": plan.config.cluster.memory_bytes,
        "time_unknown": plan.untimed or None,
        "note": note,
    }


def plan_text(plan: JobPlan, values: Mapping[str, Any]) -> list[str]:
    """Returns a plan as lines. The first says whether the run fits, and names the largest rank."""
    verdict = ("reason", plan.reason)
    if plan.fits:
        verdict = ("largest", f"{parts(plan.memory.worst)}, in GB unless MB is given")
    notes = (("note", note) for note in values.get("notes", ()))
    layout = [line for label, text in (*_layout_texts(plan).items(), *notes) for line in labeled(label, text)]
    lines = [_first_line(plan), *labeled(*verdict), "", *layout, "", *_memory_lines(plan), ""]
    if values["time"] is None:
        return [*lines, *labeled("time", f"unknown: {plan.untimed}")]
    lines += [*_time_lines(values), *_slices_lines(values), *_rollout_lines(values["rollouts"]), ""]
    lines += [*_cost_lines(values["cost"]), ""]
    number = len(values["assumptions"])
    sources = f"format=json and format=html list {number} values behind these figures, with their sources"
    return [*lines, *labeled("sources", sources)]


def _slices_lines(values: Mapping[str, Any]) -> Iterator[str]:
    """Yields the steps that were compared for numbers of slices, and what a run needs to be given."""
    if values["slices"]:
        planned = values["layout"]["slices"]
        steps = ", ".join(f"{number}: {seconds:.3f} s" for number, seconds in values["slices"].items())
        advice = f"; a run needs schedule.slices={planned}" if planned > 1 else ""
        yield from labeled("slices", f"step by slices of each sequence {steps}; planned with {planned}{advice}")


def labeled(label: str, text: str) -> list[str]:
    """Returns lines that start with a label, and continue below its text, which has no line breaks."""
    # A number stays in the line of its unit: textwrap does not break at a no-break space.
    joined = _UNIT_GAP.sub("\N{NO-BREAK SPACE}", text)
    lines = wrapped(joined, first=f"{label:<{INDENT}}", others=" " * INDENT)
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines]


def wrapped(text: str, *, first: str = "", others: str = "") -> list[str]:
    """Returns the lines of a text of any length."""
    return textwrap.wrap(text, COLUMNS, initial_indent=first, subsequent_indent=others, break_on_hyphens=False)


def _first_line(plan: JobPlan) -> str:
    room = plan.config.cluster.memory_bytes
    worst = plan.memory.worst
    needs = f"the largest rank, {worst.pipeline_rank}, needs {gigabytes(worst.total)}"
    if room is None:
        return f"{needs}; cluster.memory_bytes, the memory of a device, is not given"
    return f"{'fits' if plan.fits else 'does not fit'}: {needs} of {gigabytes(room)}"


def _layout_texts(plan: JobPlan) -> dict[str, str]:
    """Returns what is planned, by label."""
    config = plan.config
    batch = config.batch
    mesh = config.parallelism
    weights, flops = _model_values(plan).values()
    many, name = (1e9, "billion") if weights >= 1e9 else (1e6, "million")
    unit, prefix = (1e9, "G") if flops >= 1e9 else (1e6, "M")
    capped = "" if config.memory_cap is None else f" and memory_cap={config.memory_cap:g}"
    sliced = f" with schedule.slices={config.schedule.slices}{capped}" if config.schedule.slices > 1 else ""
    return {
        "model": f"{weights / many:,.1f} {name} weights, {flops / unit:,.1f} {prefix}FLOP per "
        f"trained token, {config.precision.kind}",
        "layout": f"{mesh.world_size:,} ranks: {mesh.axes()}, experts over {mesh.expert}; "
        f"schedule {config.schedule.kind}{sliced}, dispatch {config.dispatch.kind}",
        "batch": f"{batch.global_sequences:,} sequences of {batch.sequence_length_tokens:,} tokens: in each pipeline "
        f"{config.num_micro_batches // config.schedule.slices} micro-batches of {batch.micro_sequences}",
        "cut": f"{' '.join(map(str, mesh.cut.layers))} layers in the stages",
    } | hidden_experts(config)


def hidden_experts(config: TrainConfig) -> dict[str, str]:
    """Returns how many experts a token could have at the same cost (arXiv:2412.19437, section 3.2.2).

    A row crosses to a node once. While it does, a faster link within the node sends it to several ranks there.
    """
    cluster = config.cluster
    across = cluster.inter_node_bytes_per_second
    within = cluster.intra_node_bytes_per_second
    dispatch = config.dispatch
    num_nodes = config.parallelism.expert // cluster.ranks_per_node
    if not isinstance(dispatch, TwoHopDispatchConfig | DeepEPDispatchConfig):
        return {}
    if num_nodes < 2 or across is None or within is None:
        return {}
    nodes = min(dispatch.max_nodes, num_nodes)
    per_node = min(within / across, config.model.num_routed_experts / num_nodes)
    text = (
        f"{nodes * per_node:.0f} for a token at the same cost: {nodes} nodes x {per_node:.1f}, as links of "
        f"{within / _GB:.0f} GB/s within a node hide behind {across / _GB:.0f} GB/s between nodes; it has "
        f"{config.model.num_experts_per_token}"
    )
    return {"experts": text}


def _memory_lines(plan: JobPlan) -> list[str]:
    """Returns a table of the ranks' memory at its peak; neighbors of the same sizes share a line."""
    room = plan.config.cluster.memory_bytes
    unit, name = (_GB, "GB") if plan.memory.worst.total >= _GB else (_MB, "MB")
    rows = [list(_MEMORY_COLUMNS if room is not None else _MEMORY_COLUMNS[:-1])]
    for cells, group in groupby(
        plan.memory.ranks, key=lambda rank: [_size(size, unit) for size in (*_peak_parts(rank), rank.total)]
    ):
        first, *others = group
        ranks = f"{first.pipeline_rank}-{others[-1].pipeline_rank}" if others else str(first.pipeline_rank)
        rows.append([ranks, *cells, *([] if room is None else [f"{100 * first.total / room:.0f} %"])])
    return [f"memory of the pipeline ranks at their peak, in {name}", *aligned(rows)]


def _peak_parts(rank: RankMemory) -> list[int]:
    """Returns the bytes of a rank in the order of the columns. They add up to its total."""
    sizes = rank.peak_parts
    sizes["activations"] += sizes.pop("batch")
    sizes["transient"] += sizes.pop("FP8 weights") + sizes.pop("update")
    return list(sizes.values())


def _size(size: int, unit: float) -> str:
    """Returns a size for a column; what a column of GB would round to nothing is in MB."""
    if unit == _GB and 0 < size < 0.1 * _GB:
        return f"{size / _MB:.1f} MB"
    return f"{size / unit:.1f}" if size else "0"


def _time_lines(values: Mapping[str, Any]) -> Iterator[str]:
    time = values["time"]
    shape = values["shape"]
    step = time["step_seconds"]
    without = time["step_seconds_without_factor"]
    mfu = "" if time["mfu"] is None else f", MFU {100 * time['mfu']:.1f} %"
    bar = ""
    if shape is not None:
        share = f"{100 * shape['error']:.0f} %"
        bar = (
            f" (+- {share} without its sampling)"
            if values["rollouts"]
            else f" +- {step * shape['error']:.2g} s ({share})"
        )
    yield from labeled("step", f"{step:.3f} s{bar}, {time['tokens_per_second_per_gpu']:,.0f} tokens/s per GPU{mfu}")
    if shape is not None:
        yield from labeled("shape", _SHAPE.format_map(shape))
    if step != without:
        factor = f"x {step / without:.3f} for what no rate explains (efficiency.unexplained)"
        yield from labeled("factor", f"{without:.3f} s from the rates, {factor}")
    yield from labeled("busiest", _BUSIEST.format_map(time | time["parts"]))


def _rollout_lines(rollouts: Mapping[str, Any] | None) -> Iterator[str]:
    if rollouts is None:
        return
    speed = "unknown"
    if rollouts["sampling_seconds"] is not None:
        speed = (
            f"{_hours(rollouts['sampling_seconds'])} s, {rollouts['tokens_per_second_per_gpu']:,.1f} tokens/s per GPU, "
        )
        speed += f"ranks idle {100 * rollouts['idle_share']:.0f} %"
    several = "s" if rollouts["cohorts"] > 1 else ""
    caches = gigabytes(rollouts["cache_bytes"])
    yield from labeled(
        "sampling", _SAMPLING.format_map({**rollouts, "speed": speed, "several": several, "caches": caches})
    )
    yield from labeled("answers", _ANSWERS.format_map(rollouts))
    for note in rollouts["notes"]:
        yield from labeled("note", note)


def _cost_lines(cost: Mapping[str, Any]) -> Iterator[str]:
    stages = cost["stages"]
    rows = [("stage", "billion tokens", "GPU-hours", "dollars", "days", "kWh")]
    all_stages = {**cost, "name": "all", "days": sum(stage["days"] for stage in stages)}
    for stage in [*stages, all_stages] if len(stages) > 1 else stages:
        tokens = "" if stage is all_stages else _number(stage["tokens"], 1e9, 1)
        sums = (_hours(stage["gpu_hours"]), _number(stage["dollars"]), f"{stage['days']:,.1f}")
        rows.append((stage["name"], tokens, *sums, _number(stage["kilowatt_hours"])))
    for name, tokens, hours, dollars, days, energy in rows:
        yield f"{name:<18}{tokens:>16}{hours:>14}{dollars:>14}{days:>10}{energy:>14}"
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


def report_costs_text(values: Mapping[str, Any]) -> Iterator[str]:
    """Yields a table of the report's phases, published and planned, and what is not explained."""
    rows = [("phase", "published", "planned", "difference", "recipes")]
    for phase in values["phases"]:
        published, planned = phase["published_gpu_hours"], phase["planned_gpu_hours"]
        recipes = ", ".join(f"{recipe.split()[0]} {_hours(hours)}" for recipe, hours in phase["recipes"].items())
        rows.append((phase["name"], _hours(published), _hours(planned), f"{planned / published - 1:+.0%}", recipes))
    yield from aligned(rows, text=(0, 4))
    yield ""
    for phase in values["phases"]:
        rest = phase["planned_gpu_hours"] - phase["published_gpu_hours"]
        yield from labeled("open", f"{phase['name']}, {rest:+,.0f} GPU-hours: {phase['note']}")


def what_if_text(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns a table of what-ifs in their order, or nothing if there are none."""
    lines = [_changed_line("what if", "step s", "speedup", "GPU-hours", "fits")] if rows else []
    for row in rows:
        lines += _changed_lines(row["change"], row, _number(row["speedup"], digits=3))
        lines += wrapped(row["time_unknown"] or row["note"] or "", first="  ", others="    ")
    return lines


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
    milliseconds = {name: 1e3 * advice[f"{name}_seconds_per_layer"] for name in ("exchange", "compute")}
    yield _BALANCE.format_map({**advice, **milliseconds})
    link = advice["inter_node_bytes_per_second"]
    even = advice["break_even_bytes_per_second"]
    limit = f"the exchange is limited by: {advice['limit']}"
    if link is None:
        yield "break-even unknown; cluster.inter_node_bytes_per_second is null"
    elif even is None:
        yield f"break-even none for the link between nodes; {limit}"
    else:
        side = f"{link / even:.2f} x faster" if link >= even else f"{even / link:.2f} x slower"
        yield f"break-even {even / 1e9:.1f} GB/s between nodes: below it, exchange is longer than computation;"
        yield f"           the link has {link / 1e9:.1f} GB/s, {side}; {limit}"


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
        ranks, *sizes, is_equal, _ = kind.values()
        name = ",".join(map(str, ranks))
        name = name if len(name) <= 24 else f"{ranks[0]}..{ranks[-1]} ({len(ranks)})"
        rows.append([name, *(f"{size:,}" for size in sizes), "equal" if is_equal else "differs"])
    return aligned(rows)
