"""Draws a plan on one offline page without scripts, from its JSON form and its simulation."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from base.decode import flatten
from base.figures import bytes_text, plain, seconds, short, table
from dualpipe.draw.style import DEFINITIONS, LIGHT, STYLE, document, style_of
from dualpipe.draw.svg import natural_scale, svg
from dualpipe.ir import Op
from train.predict.fit import gigabytes
from train.predict.timing import TimedPlan

_STYLE = Path(__file__).with_name("page.css")
_PAIR = "pair"
_UPDATE = "update"
"""Classes of a forward with a backward, and of the optimizer."""
_MEMORY_PARTS = {
    "weights_bytes": ("weights", "p1"),
    "gradients_bytes": ("gradients", "p2"),
    "optimiser_bytes": ("optimizer", "p3"),
    "activations_bytes": ("activations", "p4"),
    "buffers_bytes": ("buffers", "p5"),
}
_TIME_PARTS = {
    "forward_seconds": ("F", "F0"),
    "backward_seconds": ("B or I", "B0"),
    "weight_seconds": ("W", "W0"),
    "pairs_seconds": ("F with B or I, overlapped", _PAIR),
    "optimiser_seconds": ("optimizer", _UPDATE),
    "bubble_seconds": ("bubble", "track"),
}
"""Name and class of each part of a bar, by the key of its size."""
_OTHERS = {
    "shape": "Distance from what the rates were measured on",
    "rollouts": "Rollouts",
    "what_if": "What if",
    "advice": "Hardware advice",
    "compared": "Predicted and measured",
    "dry_run": "Ranks that were built without devices",
}
"""Sections of a plan in JSON that it may have, in their order on the page."""
_NAMES = {
    "optimiser_bytes": "optimizer",
    "optimiser_seconds": "optimizer",
    "rows": "by gain",
    "unknown": "not computed",
    "mfu": "MFU",
    "tokens_per_second_per_gpu": "tokens/s/GPU",
    "gpu_hours": "GPU-hours",
    "kilowatt_hours": "kWh",
    "gpu_hours_per_trillion_tokens": "GPU-hours/1T",
}
_MOST_RECORDS = 500
_LONG = 24
"""Characters from which a text wraps."""


def plan_page(values: Mapping[str, Any], timed: TimedPlan | None, name: str) -> str:
    """Returns the page of a plan."""
    sections = {
        "Memory of each pipeline rank": _memory(values["memory"]),
        "Time of a step": _time(values, timed),
        "Cost": any_value(values["cost"]),
        **{title: any_value(values.get(key)) for key, title in _OTHERS.items()},
        "Assumptions": records_table(values["assumptions"]),
    }
    parts = (f"<section><h2>{escape(key)}</h2>{text}</section>" for key, text in sections.items() if text)
    title = f"Plan of {name}"
    body = f"<main><h1>{escape(title)}</h1>{_verdict(values)}{_tiles(values)}{''.join(parts)}</main>"
    return document(title, body, STYLE + _operation_styles() + _STYLE.read_text(encoding="utf-8"))


def _verdict(values: Mapping[str, Any]) -> str:
    style = {True: "good", False: "bad"}[values["fits"]] if values["memory"]["capacity_bytes"] is not None else ""
    first, *others = (escape(text) for text in values["summary"])
    reasons = map(escape, values["reasons"])
    return f'<p class="{style}"><b>{first}</b></p>' + "".join(f"<p>{text}</p>" for text in (*reasons, *others))


def _tiles(values: Mapping[str, Any]) -> str:
    time = values["time"] or {}
    cost = values["cost"] or {}
    facts = {
        "weights": short(values["model"]["parameters"]).replace("G", " billion").replace("M", " million"),
        "peak of a rank": gigabytes(values["memory"]["peak_bytes"]),
        "step": seconds(time["step_seconds"]) if time else None,
        "tokens/s per GPU": f"{time['tokens_per_second_per_gpu']:,.0f}" if time else None,
    }
    others = ((time, "mfu"), (cost, "gpu_hours"), (cost, "dollars"))
    facts |= {column_name(key): cell_text(key, part[key]) for part, key in others if part.get(key) is not None}
    return _facts({key: text for key, text in facts.items() if text is not None})


def _facts(facts: Mapping[str, str]) -> str:
    tiles = (f"<div><dt>{escape(key)}</dt><dd>{escape(text)}</dd></div>" for key, text in facts.items())
    return f"<dl>{''.join(tiles)}</dl>" if facts else ""


def _memory(memory: Mapping[str, Any]) -> str:
    room = memory["capacity_bytes"]
    limit = None if room is None else ("memory of a device", float(room))
    note = (
        "At the peak of a step. Activations are kept from F to I and from I to W; buffers are FP8 copies of weights, "
        "temporary tensors, transfers, the update, and a reserve."
    )
    bars = stacked_bars(_MEMORY_PARTS, memory["ranks"], gigabytes, limit)
    return f"<p>{note}</p>{bars}{_details('Bytes of each rank', memory['ranks'])}"


def _time(values: Mapping[str, Any], timed: TimedPlan | None) -> str:
    time = values["time"]
    if time is None:
        return f"<p>Unknown: {escape(str(values['time_unknown']))}</p>"
    factor = time["step_seconds"] / time["step_seconds_without_factor"]
    stretched = f" The factor {factor:.3f} for what no rate explains is not in the pictures." if factor != 1 else ""
    bars = [{**rank, "optimiser_seconds": time["optimiser_seconds"]} for rank in time["ranks"]]
    drawn = "" if timed is None else _timeline(timed)
    text = f"<p>What each pipeline rank does in a step.{stretched}</p>"
    numbers = _details("Seconds of each rank", time["ranks"])
    return f"{text}{stacked_bars(_TIME_PARTS, bars, seconds)}{numbers}{drawn}"


def _details(title: str, records: Sequence[Mapping[str, Any]]) -> str:
    return f"<details><summary>{escape(title)}</summary>{records_table(records)}</details>"


def stacked_bars(
    parts: Mapping[str, tuple[str, str]],
    ranks: Sequence[Mapping[str, Any]],
    show: Callable[[float], str],
    limit: tuple[str, float] | None = None,
) -> str:
    """Returns a legend and a bar for each rank on a common scale, or nothing if no bar has a length."""
    totals = [sum(float(rank[key]) for key in parts) for rank in ranks]
    longest = max(totals, default=0.0)
    if not longest > 0 or not math.isfinite(longest):
        return ""
    span = max(longest, limit[1] if limit is not None else 0.0)
    items = [
        f'<span><i class="swatch {style}"></i>{escape(name)}</span>'
        for key, (name, style) in parts.items()
        if any(rank[key] > 0 for rank in ranks)
    ]
    line = ""
    if limit is not None:
        line = f'<b class="limit" style="left:{100 * limit[1] / span:.2f}%"></b>'
        items.append(f'<span><i class="limit-swatch"></i>{escape(f"{limit[0]}, {show(limit[1])}")}</span>')
    rows = []
    for rank, total in zip(ranks, totals, strict=True):
        sized = [(name, style, float(rank[key])) for key, (name, style) in parts.items() if rank[key] > 0]
        boxes = "".join(
            f'<i class="{style}" style="width:{100 * size / span:.3f}%" title="{escape(f"{name} {show(size)}")}"></i>'
            for name, style, size in sized
        )
        label = f"rank {rank['pipeline_rank']}"
        sizes = ", ".join(f"{name} {show(size)}" for name, _, size in sized)
        about = escape(f"{label}: {sizes}; {show(total)} in all")
        rows.append(
            f'<span class="name">{label}</span><div class="bar" role="img" aria-label="{about}">{boxes}{line}</div>'
            f'<span class="sum">{escape(show(total))}</span>'
        )
    return f'<div class="legend">{"".join(items)}</div><div class="bars">{"".join(rows)}</div>'


def records_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Returns a table of records; nested keys are joined, and columns without a value are left out."""
    flat = [dict(flatten(record)) for record in records[:_MOST_RECORDS]]
    columns = dict.fromkeys(key for row in flat for key in row)
    keys = [key for key in columns if any(row.get(key) not in (None, "", []) for row in flat)]
    if not keys:
        return ""
    rows = [[cell_text(key, record.get(key)) for key in keys] for record in flat]
    left_out = len(records) - len(flat)
    note = f"<p>{left_out:,} more are left out.</p>" if left_out else ""
    return _table([column_name(key) for key in keys], rows) + note


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table in which columns with long cells read from the left and wrap."""
    long = [column for column in range(len(header)) if any(len(row[column]) > _LONG for row in rows)]
    return table(header, rows, text=long)


def any_value(value: object) -> str:
    """Returns a value of unknown form: records as a table, other lists as a list, a mapping part by part."""
    match value:
        case None:
            return ""
        case list() if all(isinstance(entry, Mapping) for entry in value):
            return records_table(value)
        case list():
            items = (escape(cell_text("", entry)) for entry in value[:_MOST_RECORDS])
            return f"<ul>{''.join(f'<li>{item}</li>' for item in items)}</ul>"
        case Mapping():
            plain_values = {key: entry for key, entry in value.items() if not isinstance(entry, list | Mapping)}
            facts = {
                column_name(key): cell_text(key, entry) for key, entry in plain_values.items() if entry is not None
            }
            parts = "".join(
                f"<h3>{escape(column_name(key))}</h3>{content}"
                for key, entry in value.items()
                if key not in plain_values and (content := any_value(entry))
            )
            return _facts(facts) + parts
        case _:
            return f"<p>{escape(cell_text('', value))}</p>"


def column_name(key: str) -> str:
    """Returns the words of a key without its unit, as in `step` for `time.step_seconds`."""
    last = key.rpartition(".")[2]
    if last in _NAMES:
        return _NAMES[last]
    for unit in ("_seconds", "_bytes", "_bytes_per_second"):
        last = last.removesuffix(unit)
    return last.replace("_", " ").replace("gpu", "GPU")


def cell_text(key: str, value: object) -> str:
    """Returns a value as plain text with the unit that its key names."""
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case str():
            return value
        case list():
            return " ".join(cell_text("", item) for item in value)
        case int() | float():
            return _number(key, value)
        case _:
            return str(value)


def _number(key: str, value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    if key.endswith("_bytes_per_second"):
        return f"{bytes_text(value)}/s"
    if key.endswith("_bytes"):
        return bytes_text(value)
    if key.endswith("_seconds"):
        return f"{value:,.4g} s" if 1 <= value < 1000 else seconds(value) if value < 1 else f"{value:,.0f} s"
    if key.endswith(("mfu", "share", "gain")):
        return f"{100 * value:.1f} %"
    if key.endswith("tokens"):
        return f"{value / 1e9:,.1f} billion" if value >= 1e9 else f"{value:,.0f}"
    if key.endswith(("hours", "dollars", "days")):
        return f"{value:,.0f}" if abs(value) >= 100 else plain(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _timeline(timed: TimedPlan) -> str:
    """Returns the picture of the busiest rank, without the declared factor."""
    rank = timed.time.busiest
    title = f"rank {rank}, which waits least, in {timed.schedule.kind}"
    scale = replace(natural_scale(timed.schedule, timed.simulation), is_seconds=True)
    picture = svg(timed.schedule, timed.simulation, title=title, scale=scale, rank=rank, standalone=False)
    return f'<div class="table" tabindex="0"><svg width="0" height="0">{DEFINITIONS}</svg>{picture}</div>'


def _operation_styles() -> str:
    """Returns the style of the bars' parts: the colors of the pictures of schedules."""
    colors = {style_of(kind, 0): color for kind, color in LIGHT.items()} | {_UPDATE: "var(--c5)"}
    colors[_PAIR] = f"linear-gradient({LIGHT[Op.FORWARD]} 50%,{LIGHT[Op.BACKWARD]} 50%)"
    return "".join(f".{name}{{background:{color}}}" for name, color in colors.items())
