"""Sums up a run in a few numbers, or several runs side by side."""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from html import escape

from train.report.chart import ChartedRun
from train.report.figures import count, num_bytes, percent, plain, seconds, short
from train.report.history import History
from train.report.rewards import HELD_OUT_REWARD, PASS_AT_1, REWARD
from train.report.table import table

_EVALUATION = re.compile(r"evaluation_[a-z0-9_]+")


def evaluation_keys(runs: Iterable[ChartedRun]) -> list[str]:
    """Returns the keys of the metrics of evaluation tasks that any run has, sorted."""
    return sorted({key for run in runs for key in run.history.keys if _EVALUATION.fullmatch(key)})


def _facts(history: History, evaluations: Iterable[str] = ()) -> list[tuple[str, float | None, Callable[[float], str]]]:
    """Returns what sums up a run, with these evaluations: name, value, how it is written."""
    return [
        ("steps", float(history.buckets[-1].last) if history.buckets else None, count),
        ("tokens", history.latest("tokens"), short),
        ("last reward, mean", history.latest(REWARD), plain),
        ("last held-out pass@1", history.latest(PASS_AT_1), percent),
        ("last held-out reward", history.latest(HELD_OUT_REWARD), plain),
        # The loss of a policy gradient is near 0 by construction.
        ("last loss, main head", None if history.tallies(REWARD) else history.latest("main_loss"), plain),
        ("last validation loss", history.latest("validation_loss"), plain),
        *((f"last {key.replace('_', ' ')}", history.latest(key), plain) for key in evaluations),
        ("time of a step, median", history.median("step_seconds"), seconds),
        ("tokens/s, median", history.median("tokens_per_second"), plain),
        ("MFU, median", history.median("mfu"), percent),
        ("bubble, median", history.median("pipeline_bubble"), percent),
        ("last MaxVio, worst layer", history.latest("max_violation"), plain),
        ("peak memory of a rank", _largest(history, "peak_memory_bytes"), num_bytes),
    ]


def tiles(history: History) -> str:
    """Returns the facts of a run as tiles."""
    shown = [
        (name, write(value)) for name, value, write in _facts(history) if value is not None and math.isfinite(value)
    ]
    return f"<dl>{''.join(f'<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>' for name, value in shown)}</dl>"


def comparison(runs: Sequence[ChartedRun]) -> str:
    """Returns a table of the runs' facts; with two runs, also the change from the first to the second."""
    evaluations = evaluation_keys(runs)
    facts = [_facts(run.history, evaluations) for run in runs]
    rows = []
    for row in zip(*facts, strict=True):
        values = [value for _, value, _ in row]
        if all(value is None for value in values):
            continue
        name, _, write = row[0]
        rows.append([name, *("none" if value is None else write(value) for value in values)])
        if len(runs) == 2:
            rows[-1].append(_change(*values))
    return table(["", *(run.name for run in runs), *["change"] * (len(runs) == 2)], rows)


def _change(first: float | None, second: float | None) -> str:
    if not first or second is None:
        return ""
    share = round(100 * (second / first - 1), 1) or 0.0
    return f"{share:+.0f} %" if abs(share) >= 100 else f"{share:+.1f} %"


def _largest(history: History, key: str) -> float | None:
    return max((tally.most for _, tally in history.tallies(key)), default=None)
