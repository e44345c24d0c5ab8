"""Charts of a run's numbers over steps, as data that the page's script draws with uPlot.

A chart is a `<figure>` with JSON in it. Where many steps make one point, a band shows their least and most.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any, Literal

from train.report.history import History, Tally

Unit = Literal["plain", "short", "bytes", "percent"]
"""How the page writes values: as the function of `train.report.figures` with this name."""

_DIGITS = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A number of the history and how it is called; `colour` is the number of its style."""

    key: str
    name: str
    colour: int
    dots: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """Something that happened at a step. `kind` is a style: `checkpoint`, or anything else for an event."""

    step: int
    kind: str
    text: str


@dataclass(slots=True)
class _Series:
    """What the script draws: a value or None for each bucket, and bands between two series, by their numbers."""

    series: list[dict[str, Any]] = field(default_factory=list)
    bands: list[tuple[int, int]] = field(default_factory=list)

    def add(self, line: Line, values: Sequence[float | None], *, is_edge: bool = False) -> int:
        """Adds values and returns their number. An edge is invisible and limits a band."""
        named = {"name": line.name, "colour": line.colour, "dots": line.dots, "edge": is_edge}
        self.series.append({**named, "values": [value if value is None else _rounded(value) for value in values]})
        return len(self.series) - 1


def chart(
    history: History,
    title: str,
    lines: Sequence[Line],
    *,
    unit: Unit = "plain",
    marks: Sequence[Mark] = (),
    from_zero: bool = False,
    is_wide: bool = False,
) -> str:
    """Returns a `<figure>` with lines for the numbers that the history knows; empty text if it knows none.

    Args:
        history: of the run.
        title: above the lines.
        lines: in the order of the legend.
        unit: how values are written.
        marks: of steps, drawn from top to bottom.
        from_zero: whether values begin at 0, or near the least.
        is_wide: whether the chart takes the page's whole width.
    """
    drawn = _Series()
    for line in lines:
        known = history.tallies(line.key)
        if not known:
            continue
        drawn.add(line, _values(history, line.key, lambda tally: tally.mean))
        if any(tally.count > 1 for _, tally in known):
            most = drawn.add(line, _values(history, line.key, lambda tally: tally.most), is_edge=True)
            least = drawn.add(line, _values(history, line.key, lambda tally: tally.least), is_edge=True)
            drawn.bands.append((most, least))
    if not drawn.series:
        return ""
    options = {"unit": unit, "fromZero": from_zero, "height": 300 if is_wide else 190}
    heading = f"<h3>{escape(title)}</h3>"
    return _figure(heading, _plot(history, drawn, title, marks, options), "wide" if is_wide else "")


def band(history: History, title: str, least: Line, most: Line) -> str:
    """Returns a plot of the range between two numbers, without a figure around it; empty text if none is known."""
    if not history.tallies(least.key) or not history.tallies(most.key):
        return ""
    drawn = _Series()
    top = drawn.add(most, _values(history, most.key, lambda tally: tally.most))
    bottom = drawn.add(least, _values(history, least.key, lambda tally: tally.least))
    drawn.bands.append((top, bottom))
    return _plot(history, drawn, title, (), {"unit": "plain", "fromZero": True, "height": 120})


def _plot(history: History, drawn: _Series, title: str, marks: Sequence[Mark], options: dict[str, Any]) -> str:
    buckets = history.buckets
    first = buckets[0].first - 0.5
    values = {
        **options,
        "title": title,
        # The last bucket may stand for fewer steps than the others.
        "extent": [first, first + len(buckets) * history.width],
        "steps": [(bucket.first + bucket.last) / 2 for bucket in buckets],
        "spans": [[bucket.first, bucket.last] for bucket in buckets],
        "series": drawn.series,
        "bands": drawn.bands,
        "marks": [[min(max(mark.step, buckets[0].first), buckets[-1].last), mark.kind] for mark in marks],
    }
    # No value can end the script element or open a comment in it.
    text = json.dumps(values, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f'<div class="plot"><script type="application/json">{text}</script></div>'


def _figure(heading: str, content: str, kind: str) -> str:
    return f'<figure class="{kind}">{heading}{content}</figure>' if kind else f"<figure>{heading}{content}</figure>"


def _values(history: History, key: str, of: Callable[[Tally], float]) -> list[float | None]:
    known = {bucket.first: of(tally) for bucket, tally in history.tallies(key)}
    return [known.get(bucket.first) for bucket in history.buckets]


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
