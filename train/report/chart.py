"""Charts of the numbers of one or several runs, as data that the page's script draws with uPlot.

A chart is a `<figure>` with JSON in it. If many steps make one point, a band shows the least and the greatest value.
The x axis of all charts (steps, tokens or hours) is in one script element of the page, `run_data`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any, Literal

from train.report.embed import embedded_json
from train.report.history import History, Tally

Unit = Literal["plain", "short", "bytes", "percent"]
"""How the page writes values: as the function of `train.report.figures` with this name."""

_DIGITS = 6
_SECONDS_PER_HOUR = 3600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A number of the history and its name; `color` is the number of its style."""

    key: str
    name: str
    color: int
    dots: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """An event of a step. `kind` is a style: `checkpoint`, or any other kind for an event."""

    step: int
    kind: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ChartedRun:
    """A run whose numbers are drawn; `name` distinguishes it from the others on the page."""

    name: str
    history: History
    marks: Sequence[Mark]


@dataclass(slots=True)
class _Series:
    """Series of a chart: a value or None for each bucket of its run, and bands between two series."""

    series: list[dict[str, Any]] = field(default_factory=list)
    bands: list[tuple[int, int]] = field(default_factory=list)

    def add(self, line: Line, run: int, values: Sequence[float | None], *, is_edge: bool = False, dash: int = 0) -> int:
        """Adds values and returns their number. An edge is invisible and limits a band."""
        rounded = [value if value is None else _rounded(value) for value in values]
        style = {"name": line.name, "color": line.color, "dots": line.dots, "edge": is_edge, "dash": dash}
        self.series.append({**style, "run": run, "values": rounded})
        return len(self.series) - 1


def chart(
    runs: Sequence[ChartedRun],
    title: str,
    lines: Sequence[Line],
    *,
    y: str = "",
    unit: Unit = "plain",
    has_marks: bool = False,
    from_zero: bool = False,
    is_wide: bool = False,
) -> str:
    """Returns a `<figure>` with lines for the numbers that the runs recorded.

    Empty text if they recorded none. Several runs differ by color, and their lines by dashes.

    Args:
        runs: in the order of the legend.
        lines: of each run, in the order of the legend.
        y: title of the vertical axis.
        has_marks: whether events and checkpoints are drawn.
        from_zero: whether values begin at 0, or near the least.
        is_wide: whether the chart takes the page's whole width.
    """
    drawn = _Series()
    for number, run in enumerate(runs):
        for place, line in enumerate(lines):
            shown, dash = line, 0
            if len(runs) > 1:
                name = run.name if len(lines) == 1 else f"{run.name}: {line.name}"
                shown, dash = Line(key=line.key, name=name, color=number + 1, dots=line.dots), place
            _add_line(drawn, run.history, number, shown, dash)
    if not drawn.series:
        return ""
    options = {"unit": unit, "y": y, "fromZero": from_zero, "height": 300 if is_wide else 210, "marks": has_marks}
    content = _plot(drawn, title, {**options, "canBeLog": unit != "percent"})
    return f"<figure{' class=wide' if is_wide else ''}><h3>{escape(title)}</h3>{content}</figure>"


def band(history: History, title: str, least: Line, most: Line, y: str) -> str:
    """Returns a plot of the range between two numbers, without a figure around it.

    Empty text if one is unknown.
    """
    if not history.tallies(least.key) or not history.tallies(most.key):
        return ""
    drawn = _Series()
    top = drawn.add(most, 0, _values(history, most.key, lambda tally: tally.most))
    bottom = drawn.add(least, 0, _values(history, least.key, lambda tally: tally.least))
    drawn.bands.append((top, bottom))
    options = {"unit": "plain", "y": y, "fromZero": True, "height": 150, "marks": False, "canBeLog": False}
    return _plot(drawn, title, options)


def run_data(runs: Sequence[ChartedRun]) -> str:
    """Returns a script element with what all charts share: the x axes, the steps of each point, events.

    Hours are those of the steps: the sum of `step_seconds`, without what happens between steps.
    """
    return f'<script type="application/json" id="runs">{embedded_json([_axes(run) for run in runs])}</script>'


def _axes(run: ChartedRun) -> dict[str, Any]:
    history, buckets = run.history, run.history.buckets
    first = buckets[0].first - 0.5 if buckets else 0.0
    tokens = _values(history, "tokens", lambda tally: tally.mean)
    return {
        "name": run.name,
        "steps": [(bucket.first + bucket.last) / 2 for bucket in buckets],
        "tokens": tokens if None not in tokens else None,
        "hours": _hours(history),
        # The last bucket may have fewer steps than the others.
        "extent": [first, first + len(buckets) * history.width],
        "spans": [[bucket.first, bucket.last] for bucket in buckets],
        "marks": [
            [min(max(mark.step, buckets[0].first), buckets[-1].last), mark.kind] for mark in run.marks if buckets
        ],
    }


def _hours(history: History) -> list[float] | None:
    """Returns the hours of training at the middle of each bucket, or None if a step's time is unknown."""
    known = {bucket.first: tally.total / _SECONDS_PER_HOUR for bucket, tally in history.tallies("step_seconds")}
    hours, before = [], 0.0
    for bucket in history.buckets:
        if bucket.first not in known:
            return None
        hours.append(_rounded(before + known[bucket.first] / 2))
        before += known[bucket.first]
    return hours


def _add_line(drawn: _Series, history: History, run: int, line: Line, dash: int) -> None:
    """Adds the means of a number, and a band from its least to its greatest values if they differ."""
    known = history.tallies(line.key)
    if not known:
        return
    drawn.add(line, run, _values(history, line.key, lambda tally: tally.mean), dash=dash)
    if any(tally.count > 1 for _, tally in known):
        most = drawn.add(line, run, _values(history, line.key, lambda tally: tally.most), is_edge=True)
        least = drawn.add(line, run, _values(history, line.key, lambda tally: tally.least), is_edge=True)
        drawn.bands.append((most, least))


def _plot(drawn: _Series, title: str, options: dict[str, Any]) -> str:
    text = embedded_json({**options, "title": title, "series": drawn.series, "bands": drawn.bands})
    return f'<div class="plot"><script type="application/json">{text}</script></div>'


def _values(history: History, key: str, of: Callable[[Tally], float]) -> list[float | None]:
    known = {bucket.first: of(tally) for bucket, tally in history.tallies(key)}
    return [known.get(bucket.first) for bucket in history.buckets]


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
