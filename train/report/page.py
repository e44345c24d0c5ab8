"""Draws a run on one offline page: curves, pipeline, experts, exchange, checkpoints and events."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from comm.exit_codes import EXIT_PREEMPTED
from dualpipe.draw.document import document
from dualpipe.draw.style import STYLE
from train.errors import LOG_FOLDER, find_errors
from train.planner.measured.compare import Comparison
from train.records.status import read_status
from train.report.chart import ChartedRun, Line, chart, run_data
from train.report.figures import num_bytes, plain, short
from train.report.layers import card, legend_gradient, overview
from train.report.predicted import predicted_tables
from train.report.rewards import answer_charts, reward_charts
from train.report.source import RunSource
from train.report.step_time import step_time
from train.report.summary import comparison, evaluation_keys, tiles
from train.report.table import table
from train.report.viewer.journals import has_journals
from train.report.viewer.page import VIEWER_NAME
from train.samples.answers import read_answers

REPORT_NAME = "report.html"
_TEMPLATE = Path(__file__).with_name("page.html")
_SCRIPT = Path(__file__).with_name("page.js")
_LIBRARY = Path(__file__).with_name("uplot")  # 1.6.32, MIT License, unchanged
_STYLES = (_LIBRARY / "uplot.css", Path(__file__).with_name("page.css"))
_MOST_EVENTS = 1000
_MOST_ERRORS = 3
_NUM_COLORS = 9
_BY_POSITION = "validation_loss_by_position."
_MOST_EVALUATIONS = 24
_RANGE = re.compile(re.escape(_BY_POSITION) + r"\d+-\d+")
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
    """A run on the page.

    Attributes:
        source: its folder.
        name: distinguishes it; plain text.
        about: describes it; plain text.
        comparison: of its plan with its steps, if the run has measured enough.
    """

    source: RunSource
    name: str
    about: str
    comparison: Comparison | None = None

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
        _section("Rewards", _viewer_link(drawn) + _charts(reward_charts(runs))),
        _section("Sampled answers", _charts(answer_charts(runs))),
        _section("Learning", _charts(_learning(runs))),
        _section("Where the time of a step goes", step_time(runs)),
        _section("Predicted and measured", predicted_tables([(run.name, run.comparison) for run in drawn])),
        _section("Speed and memory", _charts(_speed(runs))),
        _section("Pipeline", _pipeline(drawn)),
        _section("Experts", _experts(runs)),
        _section("Exchange", _exchange(runs, drawn[0].source.last if len(drawn) == 1 else {})),
        _section("Answers to held-out prompts", _answers(drawn)),
        _section("Checkpoints and events", _events(runs)),
    ]
    body = Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(title),
        about="".join(_about(run, number if len(drawn) > 1 else 0) for number, run in enumerate(drawn, 1)),
        summary=tiles(runs[0].history) if len(runs) == 1 else comparison(runs),
        run_data=run_data(runs),
        sections="\n".join(section for section in sections if section),
    )
    style = "".join(path.read_text(encoding="utf-8") for path in _STYLES) + STYLE
    notice = _comment((_LIBRARY / "LICENSE").read_text(encoding="utf-8"))
    library = _without_header((_LIBRARY / "uplot.js").read_text(encoding="utf-8"))
    script = "\n".join((notice, library, _SCRIPT.read_text(encoding="utf-8")))
    return document(title, body, style, script, has_images=True)


def _about(run: DrawnRun, number: int) -> str:
    name = f'<i class="swatch p{number}"></i><b>{escape(run.name)}</b>: ' if number else ""
    failure = _failure(run.source.folder, run.name if number else "This run")
    return f"{failure}<p>{name}{escape(run.about)}</p>"


def _failure(folder: Path, name: str) -> str:
    """Returns how a run failed and where to look; empty if it runs, is done or was preempted."""
    status = read_status(folder)
    if status is None or status.exit_code in (None, 0, EXIT_PREEMPTED):
        return ""
    ended = datetime.fromtimestamp(status.time, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    heading = f"{name} failed with exit code {status.exit_code} after step {status.step:,}, {ended}."
    files = [path.relative_to(folder).as_posix() for path in find_errors(folder)[:_MOST_ERRORS]] or [f"{LOG_FOLDER}/"]
    advice = f"See {', '.join(files)}. Newest checkpoint: {status.checkpoint or 'none'}."
    lines = (f"<b>{escape(heading)}</b>", escape(status.reason or "No reason is known."), escape(advice))
    return f'<p class="failed" role="alert">{"<br>".join(lines)}</p>'


def _viewer_link(drawn: Sequence[DrawnRun]) -> str:
    """Returns a link to the page with a run's answers; a page of several runs has none."""
    if len(drawn) > 1 or not has_journals(drawn[0].source.folder):
        return ""
    return f'<p><a href="{VIEWER_NAME}">Read the answers</a>, with the log-probability of each token.</p>'


def _comment(text: str) -> str:
    """Returns the library's license as a comment of JavaScript."""
    return f"/* uPlot 1.6.32\n{text.strip()}\n*/"


def _without_header(script: str) -> str:
    """Returns the chart library without its first line, a comment with a URL, so that the page has none."""
    return script.partition("\n")[2].strip()


def _differences(runs: Sequence[ChartedRun], differences: Sequence[Sequence[str]]) -> str:
    return table(["key", *(run.name for run in runs)], differences) if differences else ""


def _learning(runs: Sequence[ChartedRun]) -> list[str]:
    losses = _LOSSES if len(runs) == 1 else (_LOSSES[1], _LOSSES[3])
    rate, norm = [Line(key="lr", name="rate", color=1)], [Line(key="grad_norm", name="norm", color=1)]
    return [
        chart(runs, "Loss", losses, y="nats per token", has_marks=True, is_wide=True),
        chart(runs, "Learning rate", rate, y="rate", from_zero=True),
        chart(runs, "Gradient norm before clipping", norm, y="norm", has_marks=True),
        *_by_position(runs),
        *_evaluations(runs),
    ]


def _by_position(runs: Sequence[ChartedRun]) -> list[str]:
    """Returns charts of validation by position, and of how much of a step is in long documents."""
    keys = {key for run in runs for key in run.history.keys if key.startswith(_BY_POSITION)}
    first = {key: int(key.removeprefix(_BY_POSITION).split("-")[0]) for key in keys if _RANGE.fullmatch(key)}
    losses = [
        Line(key=key, name=f"tokens {key.removeprefix(_BY_POSITION)}", color=number % _NUM_COLORS + 1, dots=True)
        for number, key in enumerate(sorted(first, key=lambda key: first[key]))
    ]
    bits = [Line(key="validation_bits_per_byte", name="bits per byte", color=3, dots=True)]
    share = [Line(key="long_document_share", name="long documents", color=1)]
    return [
        chart(runs, "Validation loss by position in the document", losses, y="nats per token"),
        chart(runs, "Validation bits per byte, up to the base length", bits, y="bits per byte"),
        chart(runs, "Tokens in long documents", share, y="share of tokens", unit="percent", from_zero=True),
    ]


def _evaluations(runs: Sequence[ChartedRun]) -> list[str]:
    """Returns a chart of each metric of the evaluation tasks, if there are any."""
    names = {key: key.removeprefix("evaluation_") for key in evaluation_keys(runs)[:_MOST_EVALUATIONS]}
    return [
        chart(runs, f"Evaluation: {name}", [Line(key=key, name=name, color=1, dots=True)], y="value")
        for key, name in names.items()
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
    size = '<p><label><input type="checkbox" id="full" autocomplete="off"> full size</label></p>'
    return size + "".join(figures) if figures else ""


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
    return f"{curves}<p>Step {last['step']:,}, by layer:</p>{table(header, rows)}"


def _answers(drawn: Sequence[DrawnRun]) -> str:
    is_named = len(drawn) > 1
    rows = [
        [*[run.name] * is_named, answer.prompt, answer.reference, answer.answer]
        for run in drawn
        for answer in read_answers(run.source.folder)
    ]
    return table([*["run"] * is_named, "prompt", "reference", "answer"], rows, text=2 + is_named) if rows else ""


def _events(runs: Sequence[ChartedRun]) -> str:
    marks = sorted(((mark, run) for run in runs for mark in run.marks), key=lambda each: each[0].step)
    left_out = f"<p>The first {len(marks) - _MOST_EVENTS:,} are left out.</p>" if len(marks) > _MOST_EVENTS else ""
    is_named = len(runs) > 1
    rows = [[f"{mark.step:,}", *[run.name] * is_named, mark.kind, mark.text] for mark, run in marks[-_MOST_EVENTS:]]
    header = ["step", *["run"] * is_named, "kind", "what"]
    return left_out + table(header, rows, text=len(header) - 1) if rows else ""


def _cell(value: object, write: Callable[[float], str]) -> str:
    return write(float(value)) if isinstance(value, (int, float)) else "none"


def _charts(parts: Sequence[str]) -> str:
    shown = [part for part in parts if part]
    return f'<div class="charts">{"".join(shown)}</div>' if shown else ""


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""
