"""A run on one page that needs nothing else: curves, pipeline, experts, exchange, checkpoints and events."""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from train.report.chart import Line, Mark, chart
from train.report.figures import num_bytes, percent, plain, short
from train.report.history import History
from train.report.layers import card, legend_gradient, overview
from train.report.source import RunSource

REPORT_NAME = "report.html"
_TEMPLATE = Path(__file__).with_name("page.html")
_SCRIPT = Path(__file__).with_name("page.js")
_LIBRARY = Path(__file__).with_name("uplot")  # 1.6.32, MIT License, unchanged
_MOST_EVENTS = 1000
_LOSSES = (
    Line(key="loss", name="total", colour=0),
    Line(key="main_loss", name="main", colour=1),
    Line(key="mtp_loss", name="MTP", colour=2),
    Line(key="validation_loss", name="validation", colour=3, dots=True),
)
_LAYER_COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("rows_within_nodes", "rows within nodes", short),
    ("rows_across_nodes", "rows across nodes", short),
    ("bytes_within_nodes", "bytes within nodes", num_bytes),
    ("bytes_across_nodes", "bytes across nodes", num_bytes),
    ("nodes_per_token", "nodes per token", plain),
    ("lower_bound_share", "lower bound's share", plain),
    ("nic_imbalance", "NIC imbalance", plain),
    ("clipped_tokens", "clipped tokens", plain),
)


def html(source: RunSource, title: str, about: str) -> str:
    """The page.

    Args:
        source: that has followed its folder.
        title: of the run, plain text.
        about: a line on what it is.
    """
    history, marks = source.history, source.marks()
    sections = [
        _section("Learning", _charts(_learning(history, marks))),
        _section("Speed and memory", _charts(_speed(history, marks))),
        _section("Pipeline", _pipeline(source)),
        _section("Experts", _experts(history, marks)),
        _section("Exchange", _exchange(history, marks, source.last)),
        _section("Checkpoints and events", _events(marks)),
    ]
    return Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(title),
        about=escape(about),
        tiles="".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in _tiles(history)),
        sections="\n".join(section for section in sections if section),
        styles=(_LIBRARY / "uplot.css").read_text(encoding="utf-8"),
        notice=_comment((_LIBRARY / "LICENSE").read_text(encoding="utf-8")),
        library=_without_header((_LIBRARY / "uplot.js").read_text(encoding="utf-8")),
        script=_SCRIPT.read_text(encoding="utf-8"),
    )


def _comment(text: str) -> str:
    """Returns the library's license as a comment of JavaScript."""
    return f"/* uPlot 1.6.32\n{text.strip()}\n*/"


def _without_header(script: str) -> str:
    """Returns the library without its first line, a comment with an address: the page names no other place."""
    return script.partition("\n")[2].strip()


def _tiles(history: History) -> list[tuple[str, str]]:
    wanted: tuple[tuple[str, float | None, Callable[[float], str]], ...] = (
        ("steps", float(history.buckets[-1].last) if history.buckets else None, plain),
        ("tokens", history.latest("tokens"), short),
        ("last loss, main head", history.latest("main_loss"), plain),
        ("last validation loss", history.latest("validation_loss"), plain),
        ("tokens/s, median", history.median("tokens_per_second"), plain),
        ("MFU, median", history.median("mfu"), percent),
        ("bubble, median", history.median("pipeline_bubble"), percent),
        ("last MaxVio, worst layer", history.latest("max_violation"), plain),
        ("peak memory of a rank", _largest(history, "peak_memory_bytes"), num_bytes),
    )
    return [(name, tell(value)) for name, value, tell in wanted if value is not None and math.isfinite(value)]


def _largest(history: History, key: str) -> float | None:
    return max((tally.most for _, tally in history.tallies(key)), default=None)


def _learning(history: History, marks: Sequence[Mark]) -> list[str]:
    return [
        chart(history, "Loss in nats per token", _LOSSES, marks=marks, is_wide=True),
        chart(history, "Learning rate", [Line(key="lr", name="rate", colour=1)], from_zero=True),
        chart(history, "Gradient norm before clipping", [Line(key="grad_norm", name="norm", colour=1)], marks=marks),
    ]


def _speed(history: History, marks: Sequence[Mark]) -> list[str]:
    memory = [
        Line(key="peak_memory_bytes", name="largest of all ranks", colour=2),
        Line(key="mean_peak_memory_bytes", name="mean over ranks", colour=1),
    ]
    speed, batch = (
        Line(key="tokens_per_second", name="tokens/s", colour=1),
        Line(key="global_batch_sequences", name="sequences", colour=1),
    )
    bubble = [Line(key="pipeline_bubble", name="bubble", colour=1)]
    return [
        chart(history, "Tokens per second", [speed], unit="short", from_zero=True, marks=marks),
        chart(history, "MFU", [Line(key="mfu", name="MFU", colour=1)], unit="percent", from_zero=True),
        chart(history, "Bubble: idle part of the pipelines' time", bubble, unit="percent", from_zero=True),
        chart(history, "Peak memory", memory, unit="bytes", from_zero=True),
        chart(history, "Sequences per step", [batch], from_zero=True),
    ]


def _pipeline(source: RunSource) -> str:
    picture = source.picture()
    return f"<figure>{picture}</figure>" if picture else ""


def _experts(history: History, marks: Sequence[Mark]) -> str:
    worst = [Line(key="max_violation", name="MaxVio", colour=2)]
    numbers = {key.split(".")[1] for key in history.keys if key.startswith("router.")}
    layers = sorted({*numbers, *history.layers()}, key=lambda layer: (len(layer), layer))
    parts = [overview(history), chart(history, "MaxVio of the worst layer", worst, from_zero=True, marks=marks)]
    parts += [card(history, layer) for layer in layers]
    scale = (
        f'<div class="scale">load over the mean: a quarter or less <i style="background:{legend_gradient()}"></i> '
        "four times or more</div>"
    )
    return (scale if history.layers() else "") + _charts(parts) if any(parts) and layers else ""


def _exchange(history: History, marks: Sequence[Mark], last: Mapping[str, Any]) -> str:
    sent = [
        Line(key="inter_node_bytes", name="across nodes", colour=2),
        Line(key="intra_node_bytes", name="within nodes", colour=1),
    ]
    nodes = [Line(key="nodes_per_token", name="nodes per token", colour=1)]
    curves = _charts(
        [
            chart(history, "Bytes sent in a step", sent, unit="bytes", from_zero=True),
            chart(history, "Nodes that a token's rows go to", nodes, from_zero=True),
        ]
    )
    layers = last.get("exchange")
    if not isinstance(layers, dict) or not layers:
        return curves
    header = ["layer", *(name for _, name, _ in _LAYER_COLUMNS)]
    rows = [
        [layer.replace("_", " "), *(_cell(of_layer.get(key), tell) for key, _, tell in _LAYER_COLUMNS)]
        for layer, of_layer in layers.items()
        if isinstance(of_layer, dict)
    ]
    return f"{curves}<p>Step {last['step']:,}, by layer:</p>{_table(header, rows)}"


def _events(marks: Sequence[Mark]) -> str:
    left_out = f"<p>The first {len(marks) - _MOST_EVENTS:,} are left out.</p>" if len(marks) > _MOST_EVENTS else ""
    rows = [[f"{mark.step:,}", mark.kind, mark.text] for mark in marks[-_MOST_EVENTS:]]
    return left_out + _table(["step", "kind", "what"], rows, text=2) if rows else ""


def _cell(value: object, tell: Callable[[float], str]) -> str:
    return tell(float(value)) if isinstance(value, (int, float)) else "none"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], text: int | None = None) -> str:
    """`text`: the column that is wide and reads from the left."""
    head = "".join(f'<th{_class(text, place)} scope="col">{escape(name)}</th>' for place, name in enumerate(header))
    body = "".join(
        "<tr>" + "".join(f"<td{_class(text, place)}>{escape(cell)}</td>" for place, cell in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _class(text: int | None, place: int) -> str:
    return ' class="text"' if place == text else ""


def _charts(parts: Sequence[str]) -> str:
    shown = [part for part in parts if part]
    return f'<div class="charts">{"".join(shown)}</div>' if shown else ""


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""
