"""Sums up a run in a few numbers, or several runs side by side, and draws the parts of a step's time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from train.figures import count, num_bytes, percent, plain, seconds, short, table
from train.report.charts import Chart, ChartedRun, ChartWriter, block
from train.report.source import History


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
    known = []
    for part in _PARTS:
        numbers = run.history.statistics(f"step_time.{part.key}")
        if numbers is not None and (mean := float(np.nansum(numbers.total_N) / np.nansum(numbers.count_N))) > 0:
            known.append((part, mean))
    if not known:
        return ""
    total = sum(mean for _, mean in known)
    heading = f"<h3>{escape(run.name)}</h3>" if is_named else ""
    stretches = "".join(f'<i class="p{part.color}" style="flex:{mean / total:.6f} 0 0"></i>' for part, mean in known)
    rows = "".join(
        f'<tr><th scope="row"><i class="swatch p{part.color}"></i>{part.name}<small>{part.meaning}</small></th>'
        f"<td>{seconds(mean)}</td><td>{percent(mean / total)}</td></tr>"
        for part, mean in known
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
        ("peak memory of a rank", None if memory is None else float(np.nanmax(memory.most_N)), num_bytes),
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
