"""Charts of a report: `charts.yaml` says which numbers each shows, and the page's script draws them."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from html import escape
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from numpy.typing import NDArray

from train.figures import embedded_json
from train.report.source import History, Mark

_SECTIONS = Path(__file__).with_name("charts.yaml")
_DIGITS = 6
_SECONDS_PER_HOUR = 3600.0
_NUM_COLORS = 9
_MOST_EXPANDED = 24


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """A chart of numbers over the steps, tokens or hours of a run.

    `unit` is a function of `train.figures`. A page of several runs shows only the keys `compared`, or all.
    `is_range` fills the range from the first line's least to the second's greatest values.
    `hides_zeros`: the chart begins at 0, and is left out if all values are 0.
    """

    title: str
    lines: Mapping[str, str]
    y: str
    unit: Literal["plain", "short", "bytes", "percent"] = "plain"
    colors: Sequence[int] = ()
    compared: Sequence[str] = ()
    has_marks: bool = False
    from_zero: bool = False
    is_wide: bool = False
    is_range: bool = False
    hides_zeros: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ChartedRun:
    """A run whose numbers are drawn; `name` distinguishes it from the others on the page."""

    name: str
    history: History
    marks: Sequence[Mark]


class ChartWriter:
    """Writes the charts of one or several runs, and collects which numbers they show."""

    def __init__(self, runs: Sequence[ChartedRun]) -> None:
        self.runs = runs
        self._keys = list(dict.fromkeys(key for run in runs for key in run.history.keys))
        self._shown_keys: dict[str, tuple[str, ...]] = {}

    def figures(self, section: str) -> list[str]:
        """Returns a `<figure>` for each chart of a section; an empty text for one of which no run has numbers."""
        charts = yaml.safe_load(_SECTIONS.read_text(encoding="utf-8"))[section]
        return [self.figure(chart) for values in charts for chart in self._expanded(Chart(**values))]

    def figure(self, chart: Chart) -> str:
        """Returns a `<figure>`; empty text if no run has its numbers."""
        if not (plot := self.plot(chart)):
            return ""
        return f"<figure{' class=wide' if chart.is_wide else ''}><h3>{escape(chart.title)}</h3>{plot}</figure>"

    def plot(self, chart: Chart) -> str:
        """Returns a chart without a figure around it; empty text if no run has its numbers."""
        chosen = chart.compared if chart.compared and len(self.runs) > 1 else list(chart.lines)
        known = [key for key in chosen if key in self._keys]
        if not known or (chart.is_range and len(known) < 2) or (chart.hides_zeros and not self._has_nonzero(known)):
            return ""
        if chart.is_range:
            self._shown_keys |= {known[0]: ("least",), known[1]: ("most",)}
        else:
            self._shown_keys |= dict.fromkeys(known, ("mean", "least", "most"))
        colors = chart.colors or [number % _NUM_COLORS + 1 for number in range(len(chart.lines))]
        is_held_out = [key.startswith(("validation_", "evaluation_")) for key in chart.lines]
        named = zip(chart.lines.items(), colors, is_held_out, strict=True)
        lines = [
            {"key": key, "name": name, "color": color, "dots": dots}
            for (key, name), color, dots in named
            if key in chosen
        ]
        from_zero = chart.from_zero or chart.hides_zeros
        height = 150 if chart.is_range else 300 if chart.is_wide else 210
        values = {**asdict(chart), "lines": lines, "from_zero": from_zero, "height": height}
        return f'<div class="plot"><script type="application/json">{embedded_json(values)}</script></div>'

    def _has_nonzero(self, keys: Sequence[str]) -> bool:
        found = (run.history.statistics(key) for run in self.runs for key in keys)
        return any(np.nan_to_num([numbers.least_N, numbers.most_N]).any() for numbers in found if numbers is not None)

    def _expanded(self, chart: Chart) -> Iterator[Chart]:
        """Yields a chart with a line for each key of its pattern, or one for each key if the title has a `*`."""
        pattern, pattern_name = next(iter(chart.lines.items()))
        if "*" not in pattern:
            yield chart
            return
        names = sorted(self.names_of(pattern), key=_position)[:_MOST_EXPANDED]
        if "*" not in chart.title:
            yield replace(chart, lines={pattern.replace("*", name): pattern_name.replace("*", name) for name in names})
            return
        for name in names:
            yield replace(chart, title=chart.title.replace("*", name), lines={pattern.replace("*", name): name})

    def names_of(self, pattern: str) -> list[str]:
        """Returns what stands for the `*` of a pattern in the keys that the runs have recorded."""
        start = pattern.removesuffix("*")
        names = (key.removeprefix(start) for key in self._keys if key.startswith(start))
        return [name for name in names if re.fullmatch(r"[\w-]+", name)]

    def run_data(self) -> str:
        """Returns a script element with axes, steps of buckets, events, and numbers; hours sum `step_seconds`."""
        values = [_run_values(run, self._shown_keys) for run in self.runs]
        return f'<script type="application/json" id="runs">{embedded_json(values)}</script>'


def _position(name: str) -> tuple[int, str]:
    """Sorts ranges of positions such as `128-255` by their first number, and other names by their letters."""
    number = re.match(r"\d+", name)
    return int(number[0]) if number else 0, name


def block(figures: Iterable[str]) -> str:
    """Returns figures next to each other; empty text if all are empty."""
    content = "".join(figures)
    return f'<div class="charts">{content}</div>' if content else ""


def _run_values(run: ChartedRun, keys: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    history = run.history
    tokens = history.statistics("tokens")
    start = history.firsts[0] - 0.5 if history.firsts else 0.0
    return {
        "name": run.name,
        "steps": [(first + last) / 2 for first, last in zip(history.firsts, history.lasts, strict=True)],
        "tokens": None if tokens is None or np.isnan(tokens.mean_N).any() else _rounded(tokens.mean_N),
        "hours": _hours(history),
        # The last bucket may have fewer steps than the others.
        "extent": [start, start + len(history.firsts) * history.width],
        "spans": list(zip(history.firsts, history.lasts, strict=True)),
        "marks": [
            [min(max(mark.step, history.firsts[0]), history.lasts[-1]), mark.kind]
            for mark in run.marks
            if history.firsts
        ],
        "numbers": {key: values for key, names in keys.items() if (values := _values(history, key, names)) is not None},
    }


def _values(history: History, key: str, names: Sequence[str]) -> dict[str, list[float | None]] | None:
    """Returns the means of a number, or these statistics of it if buckets have several steps."""
    numbers = history.statistics(key)
    if numbers is None:
        return None
    if np.nanmax(numbers.count_N) == 1:
        return {"mean": _rounded(numbers.mean_N)}
    return {name: _rounded(getattr(numbers, f"{name}_N")) for name in names}


def _hours(history: History) -> list[float | None] | None:
    """Returns the hours of training at the middle of each bucket, or None if a step's time is unknown."""
    numbers = history.statistics("step_seconds")
    if numbers is None or np.isnan(numbers.total_N).any():
        return None
    return _rounded((np.cumsum(numbers.total_N) - numbers.total_N / 2) / _SECONDS_PER_HOUR)


def _rounded(values_N: NDArray[np.float64]) -> list[float | None]:
    return [None if np.isnan(value) else float(f"{value:.{_DIGITS}g}") for value in values_N.tolist()]
