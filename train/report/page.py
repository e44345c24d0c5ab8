"""Draws a run on one offline page: curves, pipeline, experts, exchange, checkpoints and events."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from train.report.chart import ChartedRun, Line, chart, run_data
from train.report.figures import count, num_bytes, percent, plain, seconds, short
from train.report.history import History
from train.report.layers import card, legend_gradient, overview
from train.report.source import RunSource
from train.report.step_time import step_time
from train.samples.answers import read_answers

REPORT_NAME = "report.html"
_TEMPLATE = Path(__file__).with_name("page.html")
_SCRIPT = Path(__file__).with_name("page.js")
_LIBRARY = Path(__file__).with_name("uplot")  # 1.6.32, MIT License, unchanged
_MOST_EVENTS = 1000
_LOSSES = (
    Line(key="loss", name="total", color=0),
    Line(key="main_loss", name="main", color=1),
    Line(key="mtp_loss", name="MTP", color=2),
    Line(key="validation_loss", name="validation", color=3, dots=True),
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


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawnRun:
    """A run on the page. `name` distinguishes it, and `about` describes it; both are plain text."""

    source: RunSource
    name: str
    about: str

    def charted(self) -> ChartedRun:
        """Returns what charts show of it."""
        return ChartedRun(name=self.name, history=self.source.history, marks=self.source.marks())


def html(drawn: Sequence[DrawnRun], title: str, differences: Sequence[Sequence[str]] = ()) -> str:
    """Returns the page of a run, or of several runs that are compared.

    Args:
        drawn: runs whose sources have followed their folders.
        title: of the page, plain text.
        differences: keys of the configuration that differ, each with the value of every run.
    """
    runs = [run.charted() for run in drawn]
    sections = [
        _section("Different settings", _differences(runs, differences)),
        _section("Learning", _charts(_learning(runs))),
        _section("Where the time of a step goes", step_time(runs)),
        _section("Speed and memory", _charts(_speed(runs))),
        _section("Pipeline", _pipeline(drawn)),
        _section("Experts", _experts(runs)),
        _section("Exchange", _exchange(runs, drawn[0].source.last if len(drawn) == 1 else {})),
        _section("Answers to held-out prompts", _answers(drawn)),
        _section("Checkpoints and events", _events(runs)),
    ]
    return Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(title),
        about="".join(_about(run, number if len(drawn) > 1 else 0) for number, run in enumerate(drawn, 1)),
        summary=_tiles(runs[0].history) if len(runs) == 1 else _comparison(runs),
        run_data=run_data(runs),
        sections="\n".join(section for section in sections if section),
        styles=(_LIBRARY / "uplot.css").read_text(encoding="utf-8"),
        notice=_comment((_LIBRARY / "LICENSE").read_text(encoding="utf-8")),
        library=_without_header((_LIBRARY / "uplot.js").read_text(encoding="utf-8")),
        script=_SCRIPT.read_text(encoding="utf-8"),
    )


def _about(run: DrawnRun, number: int) -> str:
    name = f'<i class="swatch p{number}"></i><b>{escape(run.name)}</b>: ' if number else ""
    return f"<p>{name}{escape(run.about)}</p>"


def _comment(text: str) -> str:
    """Returns the library's license as a comment of JavaScript."""
    return f"/* uPlot 1.6.32\n{text.strip()}\n*/"


def _without_header(script: str) -> str:
    """Returns the chart library without its first line, a comment with a URL, so that the page has none."""
    return script.partition("\n")[2].strip()


def _facts(history: History) -> list[tuple[str, float | None, Callable[[float], str]]]:
    """Returns the numbers that sum up a run: name, value, how it is written."""
    return [
        ("steps", float(history.buckets[-1].last) if history.buckets else None, count),
        ("tokens", history.latest("tokens"), short),
        ("last loss, main head", history.latest("main_loss"), plain),
        ("last validation loss", history.latest("validation_loss"), plain),
        ("time of a step, median", history.median("step_seconds"), seconds),
        ("tokens/s, median", history.median("tokens_per_second"), plain),
        ("MFU, median", history.median("mfu"), percent),
        ("bubble, median", history.median("pipeline_bubble"), percent),
        ("last MaxVio, worst layer", history.latest("max_violation"), plain),
        ("peak memory of a rank", _largest(history, "peak_memory_bytes"), num_bytes),
    ]


def _tiles(history: History) -> str:
    shown = [
        (name, write(value)) for name, value, write in _facts(history) if value is not None and math.isfinite(value)
    ]
    return f"<dl>{''.join(f'<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>' for name, value in shown)}</dl>"


def _comparison(runs: Sequence[ChartedRun]) -> str:
    """Returns a table of the runs' facts; with two runs, also the change from the first to the second."""
    facts = [_facts(run.history) for run in runs]
    rows = []
    for row in zip(*facts, strict=True):
        values = [value for _, value, _ in row]
        if all(value is None for value in values):
            continue
        name, _, write = row[0]
        rows.append([name, *("none" if value is None else write(value) for value in values)])
        if len(runs) == 2:
            rows[-1].append(_change(*values))
    return _table(["", *(run.name for run in runs), *["change"] * (len(runs) == 2)], rows)


def _change(first: float | None, second: float | None) -> str:
    if not first or second is None:
        return ""
    share = round(100 * (second / first - 1), 1) or 0.0
    return f"{share:+.0f} %" if abs(share) >= 100 else f"{share:+.1f} %"


def _differences(runs: Sequence[ChartedRun], differences: Sequence[Sequence[str]]) -> str:
    return _table(["key", *(run.name for run in runs)], differences) if differences else ""


def _largest(history: History, key: str) -> float | None:
    return max((tally.most for _, tally in history.tallies(key)), default=None)


def _learning(runs: Sequence[ChartedRun]) -> list[str]:
    losses = _LOSSES if len(runs) == 1 else (_LOSSES[1], _LOSSES[3])
    rate, norm = [Line(key="lr", name="rate", color=1)], [Line(key="grad_norm", name="norm", color=1)]
    return [
        chart(runs, "Loss", losses, y="nats per token", has_marks=True, is_wide=True),
        chart(runs, "Learning rate", rate, y="rate", from_zero=True),
        chart(runs, "Gradient norm before clipping", norm, y="norm", has_marks=True),
    ]


def _speed(runs: Sequence[ChartedRun]) -> list[str]:
    memory = [
        Line(key="peak_memory_bytes", name="largest of all ranks", color=2),
        Line(key="mean_peak_memory_bytes", name="mean over ranks", color=1),
    ]
    speed, batch = (
        Line(key="tokens_per_second", name="tokens/s", color=1),
        Line(key="global_batch_sequences", name="sequences", color=1),
    )
    bubble, mfu = Line(key="pipeline_bubble", name="bubble", color=1), Line(key="mfu", name="MFU", color=1)
    time = Line(key="step_seconds", name="time", color=1)
    of_peak, of_time = "share of peak FLOP/s", "share of the pipelines' time"
    return [
        chart(runs, "Tokens per second", [speed], y="tokens/s", unit="short", from_zero=True, has_marks=True),
        chart(runs, "MFU", [mfu], y=of_peak, unit="percent", from_zero=True),
        chart(runs, "Bubble: idle part of the pipelines' time", [bubble], y=of_time, unit="percent", from_zero=True),
        chart(runs, "Time of a step", [time], y="seconds", from_zero=True),
        chart(runs, "Peak memory", memory, y="bytes", unit="bytes", from_zero=True),
        chart(runs, "Sequences per step", [batch], y="sequences", from_zero=True),
    ]


def _pipeline(drawn: Sequence[DrawnRun]) -> str:
    figures = []
    for run in drawn:
        if picture := run.source.picture():
            name = escape(f"timeline of {run.name}, scrolls")
            figures.append(f'<figure tabindex="0" role="region" aria-label="{name}">{picture}</figure>')
    return "".join(figures)


def _experts(runs: Sequence[ChartedRun]) -> str:
    """Returns loads and router biases: of every layer for one run, of all layers together for several."""
    worst = [Line(key="max_violation", name="MaxVio", color=2)]
    keys = {key for run in runs for key in run.history.keys if key.startswith("router.")}
    layers = {*(key.split(".")[1] for key in keys), *(layer for run in runs for layer in run.history.layers())}
    names = [f", {run.name}" if len(runs) > 1 else "" for run in runs]
    parts = [overview(run.history, name) for run, name in zip(runs, names, strict=True)]
    parts += [chart(runs, "MaxVio of the worst layer", worst, y="MaxVio", from_zero=True, has_marks=True)]
    if len(runs) == 1:
        parts += [card(runs[0].history, layer) for layer in sorted(layers, key=lambda layer: (len(layer), layer))]
    scale = (
        f'<div class="scale">load over the mean: a quarter or less <i style="background:{legend_gradient()}"></i> '
        "four times or more</div>"
    )
    has_loads = any(run.history.layers() for run in runs)
    return (scale if has_loads else "") + _charts(parts) if any(parts) and layers else ""


def _exchange(runs: Sequence[ChartedRun], last: Mapping[str, Any]) -> str:
    """Returns the traffic over the run, and by layer that of the last step.

    `last` is empty for several runs.
    """
    sent = [
        Line(key="inter_node_bytes", name="across nodes", color=2),
        Line(key="intra_node_bytes", name="within nodes", color=1),
    ]
    nodes = [Line(key="nodes_per_token", name="nodes per token", color=1)]
    curves = _charts(
        [
            chart(runs, "Bytes sent in a step", sent, y="bytes", unit="bytes", from_zero=True),
            chart(runs, "Nodes that a token's rows go to", nodes, y="nodes", from_zero=True),
        ]
    )
    layers = last.get("exchange")
    if not isinstance(layers, dict) or not layers:
        return curves
    header = ["layer", *(name for _, name, _ in _LAYER_COLUMNS)]
    rows = [
        [layer.replace("_", " "), *(_cell(of_layer.get(key), write) for key, _, write in _LAYER_COLUMNS)]
        for layer, of_layer in layers.items()
        if isinstance(of_layer, dict)
    ]
    return f"{curves}<p>Step {last['step']:,}, by layer:</p>{_table(header, rows)}"


def _answers(drawn: Sequence[DrawnRun]) -> str:
    is_named = len(drawn) > 1
    rows = [
        [*[run.name] * is_named, answer.prompt, answer.reference, answer.answer]
        for run in drawn
        for answer in read_answers(run.source.folder)
    ]
    return _table([*["run"] * is_named, "prompt", "reference", "answer"], rows, text=2 + is_named) if rows else ""


def _events(runs: Sequence[ChartedRun]) -> str:
    marks = sorted(((mark, run) for run in runs for mark in run.marks), key=lambda each: each[0].step)
    left_out = f"<p>The first {len(marks) - _MOST_EVENTS:,} are left out.</p>" if len(marks) > _MOST_EVENTS else ""
    is_named = len(runs) > 1
    rows = [[f"{mark.step:,}", *[run.name] * is_named, mark.kind, mark.text] for mark, run in marks[-_MOST_EVENTS:]]
    header = ["step", *["run"] * is_named, "kind", "what"]
    return left_out + _table(header, rows, text=len(header) - 1) if rows else ""


def _cell(value: object, write: Callable[[float], str]) -> str:
    return write(float(value)) if isinstance(value, (int, float)) else "none"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], text: int | None = None) -> str:
    """`text`: the column that is wide and reads from the left."""
    head = "".join(f'<th{_class(text, place)} scope="col">{escape(name)}</th>' for place, name in enumerate(header))
    body = "".join(
        "<tr>" + "".join(f"<td{_class(text, place)}>{escape(cell)}</td>" for place, cell in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f'<div class="table" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _class(text: int | None, place: int) -> str:
    return ' class="text"' if place == text else ""


def _charts(parts: Sequence[str]) -> str:
    shown = [part for part in parts if part]
    return f'<div class="charts">{"".join(shown)}</div>' if shown else ""


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""
