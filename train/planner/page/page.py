"""Draws a plan on one offline page without scripts, from its JSON form and its simulation."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from dualpipe.draw.document import document
from train.planner.page.bars import Bar, BarPart, Limit, stacked_bars
from train.planner.page.records import any_value, records_table, shown
from train.planner.page.timeline import PAIR, UPDATE, style_sheet, timeline
from train.planner.timing import TimedPlan
from train.report.elements import table
from train.report.figures import seconds, short

_STYLE = Path(__file__).with_name("page.css")
_MEMORY_PARTS = (
    BarPart("weights", "p1"),
    BarPart("gradients", "p2"),
    BarPart("optimizer", "p3"),
    BarPart("activations", "p4"),
    BarPart("buffers", "p5"),
)
_MEMORY_KEYS = ("weights_bytes", "gradients_bytes", "optimiser_bytes", "activations_bytes", "buffers_bytes")
_TIME_PARTS = (
    BarPart("F", "F0"),
    BarPart("B or I", "B0"),
    BarPart("W", "W0"),
    BarPart("F with B or I, overlapped", PAIR),
    BarPart("optimizer", UPDATE),
    BarPart("bubble", "track"),
)
_TIME_KEYS = ("forward_seconds", "backward_seconds", "weight_seconds", "pairs_seconds")
_OTHERS = (
    ("what_if", "What if"),
    ("advice", "Hardware advice"),
    ("candidates", "Layouts"),
    ("rejected", "Rejected layouts"),
    ("compared", "Predicted and measured"),
    ("dry_run", "Ranks that were built without devices"),
)
"""Sections of a plan in JSON that it may have, in their order on the page."""


def plan_page(values: Mapping[str, Any], timed: TimedPlan | None, name: str) -> str:
    """Returns the page of a plan.

    Args:
        values: the plan in JSON form.
        timed: its schedule and simulation, for the timeline; None if there is no time.
        name: of the run, plain text.
    """
    sections = [
        _section("Memory of each pipeline rank", _memory(values["memory"])),
        _section("Time of a step", _time(values, timed)),
        _section("Cost", _cost(values["cost"])),
        *(_section(title, any_value(values.get(key))) for key, title in _OTHERS),
        _section("Assumptions", _assumptions(values["assumptions"])),
    ]
    title = f"Plan of {name}"
    body = f"<main><h1>{escape(title)}</h1>{_verdict(values)}{_tiles(values)}{''.join(sections)}</main>"
    return document(title, body, style_sheet() + _STYLE.read_text(encoding="utf-8"))


def _verdict(values: Mapping[str, Any]) -> str:
    memory, layout = values["memory"], values["layout"]
    room, peak = memory["capacity_bytes"], shown("_bytes", memory["peak_bytes"])
    largest = max(memory["ranks"], key=lambda rank: rank["total_bytes"])["pipeline_rank"]
    if room is None:
        text, style = f"The largest rank, {largest}, needs {peak}. The memory of a device is not given.", ""
    else:
        fits = "It fits" if values["fits"] else "It does not fit"
        text, style = f"{fits}: the largest rank, {largest}, needs {peak} of {shown('_bytes', room)}.", ""
        style = ' class="good"' if values["fits"] else ' class="bad"'
    reasons = "".join(f"<p>{escape(reason)}</p>" for reason in values["reasons"])
    words = (
        f"{layout['ranks']:,} ranks: pipeline {layout['pipeline']} x data {layout['data']}, experts over "
        f"{layout['expert']}; schedule {layout['schedule']}, {layout['num_micro_batches']} micro-batches in each "
        f"pipeline, sequences of a micro-batch {layout['micro_batch_sequences']}; {layout['precision']}; "
        f"layers in the stages: {' '.join(map(str, layout['cut']))}"
    )
    return f"<p{style}><b>{escape(text)}</b></p>{reasons}<p>{escape(words)}</p>"


def _tiles(values: Mapping[str, Any]) -> str:
    time, cost = values["time"], values["cost"]
    facts = [
        ("weights", short(values["model"]["parameters"]).replace("G", " billion").replace("M", " million")),
        ("peak of a rank", _bytes(values["memory"]["peak_bytes"])),
    ]
    if time is not None:
        facts += [("step", seconds(time["step_seconds"]))]
        facts += [("tokens/s per GPU", f"{time['tokens_per_second_per_gpu']:,.0f}")]
        facts += [] if time["mfu"] is None else [("MFU", shown("mfu", time["mfu"]))]
    if cost is not None:
        facts += [("GPU-hours", shown("gpu_hours", cost["gpu_hours"]))]
        facts += [] if cost["dollars"] is None else [("dollars", shown("dollars", cost["dollars"]))]
    return f"<dl>{''.join(f'<div><dt>{escape(key)}</dt><dd>{escape(text)}</dd></div>' for key, text in facts)}</dl>"


def _memory(memory: Mapping[str, Any]) -> str:
    ranks, room = memory["ranks"], memory["capacity_bytes"]
    bars = [
        Bar(label=f"rank {rank['pipeline_rank']}", sizes=tuple(float(rank[key]) for key in _MEMORY_KEYS))
        for rank in ranks
    ]
    limit = None if room is None else Limit(name="memory of a device", size=float(room))
    note = (
        "At the peak of a step. Activations are kept from F to I and from I to W; buffers are FP8 copies of weights, "
        "temporary tensors, transfers, the update, and a reserve."
    )
    numbers = _details("Bytes of each rank", records_table(ranks))
    return f"<p>{note}</p>{stacked_bars(_MEMORY_PARTS, bars, _bytes, limit)}{numbers}"


def _time(values: Mapping[str, Any], timed: TimedPlan | None) -> str:
    time = values["time"]
    if time is None:
        return f"<p>Unknown: {escape(str(values['time_unknown']))}</p>"
    factor = time["step_seconds"] / time["step_seconds_without_factor"]
    stretched = f" The factor {factor:.3f} for what no rate explains is not in the pictures." if factor != 1 else ""
    bars = [
        Bar(
            label=f"rank {rank['pipeline_rank']}",
            sizes=(*(rank[key] for key in _TIME_KEYS), time["optimiser_seconds"], rank["bubble_seconds"]),
        )
        for rank in time["ranks"]
    ]
    numbers = _details("Seconds of each rank", records_table(time["ranks"]))
    drawn = "" if timed is None else f"<h3>Rank {time['busiest_rank']}, which waits least</h3>{timeline(timed)}"
    text = f"<p>What each pipeline rank does in a step.{stretched}</p>"
    return f"{text}{stacked_bars(_TIME_PARTS, bars, seconds)}{numbers}{drawn}"


def _cost(cost: Mapping[str, Any] | None) -> str:
    if cost is None:
        return ""
    stages = [*cost["stages"]]
    if len(stages) > 1:
        sums = {key: cost[key] for key in ("gpu_hours", "dollars", "kilowatt_hours")}
        stages.append({"name": "all", **sums, "days": sum(stage["days"] for stage in stages)})
    hours = f"{cost['gpu_hours_per_trillion_tokens']:,.0f}"
    goodput = "" if cost["goodput"] is None else any_value({"goodput": cost["goodput"]})
    return f"{records_table(stages)}<p>A trillion tokens take {hours} GPU-hours.</p>{goodput}"


def _assumptions(assumptions: Sequence[Mapping[str, Any]]) -> str:
    rows = [[str(each["name"]), f"{each['value']:.6g}", str(each["unit"]), str(each["source"])] for each in assumptions]
    return table(["name", "value", "unit", "source"], rows, text=3) if rows else ""


def _details(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""


def _bytes(value: float) -> str:
    return f"{value / 1e9:.1f} GB" if value >= 1e8 else f"{value / 1e6:.1f} MB"
