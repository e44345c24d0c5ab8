"""Draws a run on one offline page: summary, curves, pipeline, experts, exchange, and events."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from base.decode import encode, flatten
from base.figures import bytes_text, count, percent, plain, seconds, short, table
from base.files import replace_text
from base.refusal import ConfigError
from comm.exits import EXIT_PREEMPTED
from dualpipe.draw.style import STYLE, document
from train.config import TrainConfig
from train.files.json_lines import MICRO_BATCH_LOADS
from train.files.run_files import LOG_FOLDER, find_errors, read_status, redact, redact_values
from train.predict.measured import MEASURED_NAME, PROBE_NAME
from train.report.charts import Chart, ChartedRun, ChartWriter, block, card, overview, scale
from train.report.micro_batches import (
    MODES,
    balance_costs,
    expert_nodes,
    grouped_loads,
    middle_batch,
    read_micro_batch_loads,
    replay,
)
from train.report.plan_comparison import COMPARED_HEADER, Comparison, compared_run, comparison_notes, comparison_rows
from train.report.source import History, RunSource
from train.report.viewer import VIEWER_NAME, RolloutViewer, has_journals, read_answers

COMPARISON_NAME = "comparison.html"
LOGGER = logging.getLogger("train")
REPORT_NAME = "report.html"
_TEMPLATE = Path(__file__).with_name("page.html")
_SCRIPT = Path(__file__).with_name("page.js")
_LIBRARY = Path(__file__).with_name("uplot")  # 1.6.32, MIT License, unchanged
_STYLES = (_LIBRARY / "uplot.css", Path(__file__).with_name("page.css"))
_MOST_EVENTS = 1000
_MOST_ERRORS = 3
_LAYER_COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("rows_within_nodes", "rows within nodes", short),
    ("rows_across_nodes", "rows across nodes", short),
    ("bytes_within_nodes", "bytes within nodes", bytes_text),
    ("bytes_across_nodes", "bytes across nodes", bytes_text),
    ("nodes_per_token", "nodes per token", plain),
    ("lower_bound_share", "lower bound's share", plain),
    ("nic_imbalance", "NIC imbalance", plain),
    ("clipped_tokens", "clipped tokens", plain),
)
_MOST_LOAD_BYTES = 2**26
"""Recorded loads of micro-batches from which the figure of a report is drawn."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawnRun:
    """A run on the page, with its name and description as plain text and the comparison with its plan."""

    source: RunSource
    name: str
    about: str
    comparison: Comparison | None = None
    balance: str = ""


class Report:
    """Follows a run's folder and draws it, with limited time and memory however long the run is."""

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._source = RunSource(Path(config.out_dir))
        self._viewer = RolloutViewer(self._source.folder, config.data.tokenizer)

    def write(self) -> Path:
        """Draws the folder's content, and returns the report, which links the page of answers if any.

        A new page replaces an earlier one when it is complete.
        """
        self._source.follow()
        run = _describe_run(self._config, self._source, self._config.name)
        path = self._source.folder / REPORT_NAME
        replace_text(path, html([run], run.name))
        if self._viewer.has_rollouts:
            replace_text(self._source.folder / VIEWER_NAME, self._viewer.html(run.name, run.about))
        return path

    def try_to_write(self) -> None:
        """Writes the report during a run, which must continue: errors are only logged."""
        try:
            self.write()
        except OSError as error:  # the folder was deleted or its disk is full
            LOGGER.warning("%s: cannot be drawn: %s", self._source.folder / REPORT_NAME, error)
        except Exception:
            LOGGER.exception("%s: cannot be drawn", self._source.folder / REPORT_NAME)


def compare(configs: Sequence[TrainConfig]) -> Path:
    """Draws several runs on one page, `comparison.html` in the folder of the first, and returns its path."""
    drawn = []
    for name, config in zip(_names(configs), configs, strict=True):
        source = RunSource(Path(config.out_dir))
        source.follow()
        drawn.append(_describe_run(config, source, name))
    title = " and ".join(run.name for run in drawn)
    path = drawn[0].source.folder / COMPARISON_NAME
    replace_text(path, html(drawn, title, differing_settings(configs)))
    return path


def _describe_run(config: TrainConfig, source: RunSource, name: str) -> DrawnRun:
    return DrawnRun(
        source=source,
        name=redact(name),
        about=redact(about(config)),
        comparison=comparison_of(config),
        balance=balance_text(config, source.folder),
    )


def balance_text(config: TrainConfig, folder: Path) -> str:
    """Returns the rows of each rank in a recorded micro-batch under each mode; empty if none is."""
    num_bytes = sum(path.stat().st_size for path in (folder / MICRO_BATCH_LOADS).rglob("*.jsonl"))
    if not num_bytes or config.parallelism.expert == 1:
        return ""
    if num_bytes > _MOST_LOAD_BYTES:
        return f"{MICRO_BATCH_LOADS} is too large for a figure: python -m launch.plan run=RUN loads=RUN reads it"
    try:
        loads = grouped_loads(read_micro_batch_loads(folder, config), config.parallelism.expert)
        batches = replay(loads, expert_nodes(config), balance_costs(config))
    except ConfigError as error:  # a file of another run, or one that was changed
        return str(error)
    middle = middle_batch(batches) if batches else None
    lines = [] if middle is None else [f"{mode:<6}{middle.bars(mode)}  {middle.fullest(mode):.3f}" for mode in MODES]
    return "\n".join(lines)


def comparison_of(config: TrainConfig) -> Comparison | None:
    """Returns the comparison of a run with its plan; None if the run has not measured enough yet."""
    folder = Path(config.out_dir)
    if not any((folder / name).is_file() for name in (PROBE_NAME, MEASURED_NAME)):
        return None
    try:
        return compared_run(config, folder)
    except (OSError, ValueError) as error:  # such as a step of a smaller batch, or a file that another run wrote
        LOGGER.info("no comparison of plan and run: %s", error)
        return None


def differing_settings(configs: Sequence[TrainConfig]) -> list[list[str]]:
    """Returns dotted keys, except names and folders, that differ, each with every run's value."""
    settings = [dict(flatten(redact_values(encode(config)))) for config in configs]
    keys = [key for key in dict.fromkeys(key for run in settings for key in run) if key not in ("name", "out_dir")]
    rows = [[key, *(str(run.get(key, "none")) for run in settings)] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def _names(configs: Sequence[TrainConfig]) -> list[str]:
    """Returns the names of the runs; equal ones get the folder's name, or else a number."""
    names = [config.name for config in configs]
    if len(set(names)) < len(names):
        names = [f"{config.name} {Path(config.out_dir).resolve().name}" for config in configs]
    if len(set(names)) < len(names):
        names = [f"{name} ({number})" for number, name in enumerate(names, 1)]
    return names


def about(config: TrainConfig) -> str:
    """A line on a run: its ranks, its batch, its folder."""
    mesh = config.parallelism
    batch = config.batch
    return (
        f"{mesh.world_size} ranks ({mesh.axes()}, experts over {mesh.expert}), "
        f"schedule {config.schedule.kind}, {config.precision.kind}, {batch.global_sequences} sequences of "
        f"{batch.sequence_length_tokens} tokens a step, {config.task.steps:,} steps asked for; folder {config.out_dir}"
    )


def html(drawn: Sequence[DrawnRun], title: str, differences: Sequence[Sequence[str]] = ()) -> str:
    """Returns the page of a run, or of several runs that are compared.

    Sources have followed their folders. `differences` are keys of the configuration, each with the value of every run.
    """
    runs = [ChartedRun(name=run.name, history=run.source.history, marks=run.source.marks()) for run in drawn]
    charts = ChartWriter(runs)
    sections = [
        _section(
            "Different settings", table(["key", *(run.name for run in drawn)], differences) if differences else ""
        ),
        _section("Rewards", _viewer_link(drawn) + block(charts.figures("Rewards"))),
        _section("Sampled answers", block(charts.figures("Sampled answers"))),
        _section("Learning", block(charts.figures("Learning"))),
        _section("Where the time of a step goes", step_time(charts)),
        _section("Predicted and measured", predicted_tables([(run.name, run.comparison) for run in drawn])),
        _section("Speed and memory", block(charts.figures("Speed and memory"))),
        _section("Pipeline", _pipeline(drawn)),
        _section("Experts", _experts(charts) + "".join(map(_balance, drawn))),
        _section("Exchange", _exchange(charts, drawn[0].source.last if len(drawn) == 1 else {})),
        # After the other charts, because it has the numbers that none of them shows.
        _section("Other numbers and metrics of plugins", block(charts.other_figures())),
        _section("Answers to held-out prompts", _answers(drawn)),
        _section("Checkpoints and events", _events(charts.runs)),
    ]
    body = Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(title),
        about="".join(_about(run, number if len(drawn) > 1 else 0) for number, run in enumerate(drawn, 1)),
        summary=summary(charts),
        run_data=charts.run_data(),
        sections="\n".join(section for section in sections if section),
    )
    style = "".join(path.read_text(encoding="utf-8") for path in _STYLES) + STYLE
    notice = f"/* uPlot 1.6.32\n{(_LIBRARY / 'LICENSE').read_text(encoding='utf-8').strip()}\n*/"
    # The library's first line is a comment with a URL, and the page has none.
    library = (_LIBRARY / "uplot.js").read_text(encoding="utf-8").partition("\n")[2].strip()
    script = "\n".join((notice, library, _SCRIPT.read_text(encoding="utf-8")))
    return document(title, body, style, script, has_images=True)


def _about(run: DrawnRun, number: int) -> str:
    name = f'<i class="swatch p{number}"></i><b>{escape(run.name)}</b>: ' if number else ""
    failure = _failure(run.source.folder, run.name if number else "This run")
    lines = [name + escape(run.about)]
    status = read_status(run.source.folder)
    if status is not None and status.started is not None:
        commit = f", commit {status.commit}" if status.commit else ""
        lines[0] += escape(f"; started {_date(status.started)} on {status.host}{commit}")
        lines += [f"<code>{escape(status.command)}</code>"] if status.command else []
    return f"{failure}<p>{'<br>'.join(lines)}</p>"


def _date(seconds_since_1970: float) -> str:
    return datetime.fromtimestamp(seconds_since_1970, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _failure(folder: Path, name: str) -> str:
    """Returns how a run failed and where to look; empty if it runs, is done or was preempted."""
    status = read_status(folder)
    if status is None or status.exit_code in (None, 0, EXIT_PREEMPTED):
        return ""
    ended = _date(status.time)
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


def predicted_tables(comparisons: Sequence[tuple[str, Comparison | None]]) -> str:
    """Returns a table and notes for each run, by name, that has a comparison with its plan."""
    parts = []
    for name, comparison in comparisons:
        if comparison is not None:
            heading = f"<h3>{escape(name)}</h3>" if len(comparisons) > 1 else ""
            about = f"Medians over {comparison.num_steps:,} steps, means over ranks."
            values = comparison.values()
            lines = "".join(f"<p>{escape(line)}</p>" for line in (about, *comparison_notes(values)))
            parts.append(heading + table(COMPARED_HEADER, list(comparison_rows(values))) + lines)
    return "".join(parts)


def _pipeline(drawn: Sequence[DrawnRun]) -> str:
    figures = []
    for run in drawn:
        if picture := run.source.picture():
            name = escape(f"timeline of {run.name}, scrolls")
            figures.append(f'<figure tabindex="0" role="region" aria-label="{name}">{picture}</figure>')
    size = '<p><label><input type="checkbox" id="fit" autocomplete="off"> fit to the window</label></p>'
    return size + "".join(figures) if figures else ""


def _experts(charts: ChartWriter) -> str:
    """Returns loads and router biases: of every layer for one run, of all layers together for several."""
    histories = [run.history for run in charts.runs]
    layers = {key.split(".")[1] for history in histories for key in history.keys if key.startswith("router.")}
    layers |= {layer for history in histories for layer in history.layers()}
    if not layers:
        return ""
    names = [f", {run.name}" if len(charts.runs) > 1 else "" for run in charts.runs]
    parts = [overview(history, name) for history, name in zip(histories, names, strict=True)]
    parts += charts.figures("Experts")
    if len(histories) == 1:
        parts += [card(charts, histories[0], layer) for layer in sorted(layers, key=lambda layer: (len(layer), layer))]
    return (scale() if any(history.layers() for history in histories) else "") + block(parts)


def _balance(run: DrawnRun) -> str:
    """Returns the rows of each rank with and without copies of experts, if micro-batches were recorded."""
    if not run.balance:
        return ""
    title = "Rows of each rank in a typical micro-batch by dispatch.balance, and those of the fullest over the mean"
    return f"<figure><h3>{title}, {escape(run.name)}</h3><pre>{escape(run.balance)}</pre></figure>"


def _exchange(charts: ChartWriter, last: Mapping[str, Any]) -> str:
    """Returns the traffic over the run, and by layer that of the last step, if there is one."""
    curves = block(charts.figures("Exchange"))
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
    return table([*["run"] * is_named, "prompt", "reference", "answer"], rows, text=[2 + is_named]) if rows else ""


def _events(runs: Sequence[ChartedRun]) -> str:
    marks = sorted(((mark, run) for run in runs for mark in run.marks), key=lambda each: each[0].step)
    left_out = f"<p>The first {len(marks) - _MOST_EVENTS:,} are left out.</p>" if len(marks) > _MOST_EVENTS else ""
    is_named = len(runs) > 1
    rows = [[f"{mark.step:,}", *[run.name] * is_named, mark.kind, mark.text] for mark, run in marks[-_MOST_EVENTS:]]
    header = ["step", *["run"] * is_named, "kind", "what"]
    return left_out + table(header, rows, text=[len(header) - 1]) if rows else ""


def _cell(value: object, write: Callable[[float], str]) -> str:
    return write(float(value)) if isinstance(value, (int, float)) else "none"


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of a step's time; `key` is that of `metrics.jsonl`, `color` the number of its style."""

    key: str
    name: str
    meaning: str
    color: int


_PARTS = (
    _Part("sampling_seconds", "sampling", "answers of the model", 7),
    _Part("scoring_seconds", "scoring", "waiting for the rewards of answers", 8),
    _Part("earlier_batches_seconds", "earlier batches", "all batches of a step before its last", 9),
    _Part("compute_seconds", "compute", "forward and backward", 1),
    _Part("exposed_exchange_seconds", "exposed exchange", "waiting for dispatch and combine", 2),
    _Part("bubble_seconds", "bubble", "idle: waiting for other pipeline ranks", 4),
    _Part("optimizer_seconds", "optimizer", "gradient sums and the update of the weights", 3),
    _Part("other_seconds", "other", "reading data, passes without gradients, agreement of the ranks", 5),
    _Part("saving_seconds", "saving", "waiting for checkpoints, between steps", 6),
)


def step_time(charts: ChartWriter) -> str:
    """Returns a bar and a table for each run with such records, and a chart of one run's parts."""
    bars = "".join(_bar(run, is_named=len(charts.runs) > 1) for run in charts.runs)
    if not bars or len(charts.runs) > 1:
        return bars
    chart = Chart(
        title="Parts of a step's time",
        lines={f"step_time.{part.key}": part.name for part in _PARTS},
        colors=[part.color for part in _PARTS],
        y="seconds",
        is_wide=True,
    )
    return bars + block([charts.figure(chart)])


def _bar(run: ChartedRun, *, is_named: bool) -> str:
    means = []
    for part in _PARTS:
        numbers = run.history.statistics(f"step_time.{part.key}")
        if numbers is not None and (mean := float(np.nansum(numbers.total_N) / np.nansum(numbers.count_N))) > 0:
            means.append((part, mean))
    if not means:
        return ""
    total = sum(mean for _, mean in means)
    heading = f"<h3>{escape(run.name)}</h3>" if is_named else ""
    stretches = "".join(f'<i class="p{part.color}" style="flex:{mean / total:.6f} 0 0"></i>' for part, mean in means)
    rows = "".join(
        f'<tr><th scope="row"><i class="swatch p{part.color}"></i>{part.name}<small>{part.meaning}</small></th>'
        f"<td>{seconds(mean)}</td><td>{percent(mean / total)}</td></tr>"
        for part, mean in means
    )
    return (
        f'{heading}<div class="parts" aria-hidden="true">{stretches}</div><table class="parts-table">'
        "<caption>Mean over the steps and all ranks</caption>"
        f'<thead><tr><th scope="col">part</th><th scope="col">time</th><th scope="col">share</th></tr></thead>'
        f"<tbody>{rows}</tbody></table>"
    )


def _facts(history: History, evaluations: Sequence[str] = ()) -> list[tuple[str, float | None, Callable[[float], str]]]:
    """Returns what sums up a run, with these evaluations: name, value, how it is written."""

    def median(key: str) -> float | None:
        numbers = history.statistics(key)
        return None if numbers is None else float(np.nanmedian(numbers.mean_N))

    memory = history.statistics("peak_memory_bytes")
    return [
        ("steps", float(history.lasts[-1]) if history.lasts else None, count),
        ("tokens", history.latest("tokens"), short),
        ("last reward, mean", history.latest("rollouts.reward"), plain),
        ("last held-out pass@1", history.latest("validation_pass_at_1"), percent),
        ("last held-out reward", history.latest("validation_reward"), plain),
        # The loss of a policy gradient is near 0 by construction.
        ("last loss, main head", None if history.statistics("rollouts.reward") else history.latest("main_loss"), plain),
        ("last validation loss", history.latest("validation_loss"), plain),
        *(
            (f"last evaluation {name.replace('_', ' ')}", history.latest(f"evaluation_{name}"), plain)
            for name in evaluations
        ),
        ("time of a step, median", median("step_seconds"), seconds),
        ("tokens/s, median", median("tokens_per_second"), plain),
        ("MFU, median", median("mfu"), percent),
        ("bubble, median", median("pipeline_bubble"), percent),
        ("last MaxVio, worst layer", history.latest("max_violation"), plain),
        ("peak memory of a rank", None if memory is None else float(np.nanmax(memory.most_N)), bytes_text),
    ]


def summary(charts: ChartWriter) -> str:
    """Returns a run's facts as tiles, or a table of several runs' facts; with two runs, also the change."""
    if len(charts.runs) == 1:
        facts = [(name, write(value)) for name, value, write in _facts(charts.runs[0].history) if value is not None]
        return (
            "<dl>"
            + "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in facts)
            + "</dl>"
        )
    evaluations = sorted(charts.names_of("evaluation_*"))
    rows = []
    for row in zip(*(_facts(run.history, evaluations) for run in charts.runs), strict=True):
        values = [value for _, value, _ in row]
        if all(value is None for value in values):
            continue
        name, _, write = row[0]
        rows.append([name, *("none" if value is None else write(value) for value in values)])
        if len(values) == 2:
            rows[-1].append(_change(*values))
    return table(["", *(run.name for run in charts.runs), *["change"] * (len(charts.runs) == 2)], rows)


def _change(first: float | None, second: float | None) -> str:
    if not first or second is None:
        return ""
    share = round(100 * (second / first - 1), 1) or 0.0
    return f"{share:+.0f} %" if abs(share) >= 100 else f"{share:+.1f} %"
