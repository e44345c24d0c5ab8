"""Draws the parts of a step's time: a bar of their means, and their seconds over the run."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from train.report.chart import ChartedRun, Line, chart
from train.report.figures import percent, seconds
from train.report.history import History


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


def step_time(runs: Sequence[ChartedRun]) -> str:
    """Returns a bar and a table for each run, and a chart of one run's parts.

    Empty text without such records.
    """
    bars = [_bar(run, is_named=len(runs) > 1) for run in runs]
    if not any(bars):
        return ""
    lines = [Line(key=f"step_time.{part.key}", name=part.name, color=part.color) for part in _PARTS]
    curves = chart(runs, "Parts of a step's time", lines, y="seconds", is_wide=True) if len(runs) == 1 else ""
    return "".join(bars) + (f'<div class="charts">{curves}</div>' if curves else "")


def _bar(run: ChartedRun, *, is_named: bool) -> str:
    means = [(part, _mean(run.history, f"step_time.{part.key}")) for part in _PARTS]
    known = [(part, mean) for part, mean in means if mean is not None and mean > 0]
    total = sum(mean for _, mean in known)
    if total <= 0:
        return ""
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


def _mean(history: History, key: str) -> float | None:
    tallies = [tally for _, tally in history.tallies(key)]
    count = sum(tally.count for tally in tallies)
    return sum(tally.total for tally in tallies) / count if count else None
