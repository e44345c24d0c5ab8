"""Draws the charts of a report, maps of experts' loads, and the page of an evaluation.

`charts.yaml` says which numbers each chart shows, and the page's script draws them. The page of an evaluation has
no script. No torch here.
"""

import base64
import re
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from html import escape
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from numpy.typing import NDArray

from base.figures import embedded_json, plain, table
from dualpipe.draw.style import document
from evaluation.protocol import ResultGrid
from evaluation.run import TaskResult
from evaluation.statistics import PairedComparison
from train.report.source import History, Loads, Mark

_SECTIONS = Path(__file__).with_name("charts.yaml")
_DIGITS = 6
_SECONDS_PER_HOUR = 3600.0
_NUM_COLORS = 9
_MOST_EXPANDED = 24
_ROW, _LEAST_MAP, _MOST_MAP = 9.0, 96.0, 260.0  # pixels
_LEAST_ROW = 8.0
_MOST_ROW = 22.0
_OVERVIEW = 160.0
_MOST_NAMES = 12
# Load over the mean, from a quarter (or less) to four times (or more), by its logarithm.
_COLD = (33, 99, 201)
_EVEN = (240, 240, 236)
_HOT = (178, 34, 0)
_SHADES = 65
_OCTAVES = 2.0
EVALUATION_PAGE_NAME = "report.html"
_WIDTH = 720
_BAR_HEIGHT = 30
_LABEL = 190
_VALUE = 150
_CELL = 44
_MARGIN = 110
_STYLE = """
.bar{fill:var(--c1)}.whisker{stroke:var(--ink);stroke-width:1.5}.zero{stroke:var(--line)}
svg text{fill:var(--ink);font-size:12.5px}svg .soft{fill:var(--soft)}
.table{border:0}.table table{width:auto}figure{margin:8px 0 18px;border:0}figcaption{font-weight:600;margin-bottom:6px}
"""


DomainLoads = Mapping[str, Loads]
"""Loads of the experts of each layer, by domain."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """A chart of numbers over the steps, tokens or hours of a run.

    `unit` is a function of `base.figures`. A page of several runs shows only the keys `compared`, or all.
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
    """A run to draw; `name` distinguishes it from the others on the page."""

    name: str
    history: History
    marks: Sequence[Mark]


@cache
def _sections() -> dict[str, list[dict[str, Any]]]:
    """Reads the charts of every section once in a process, because reports are written often."""
    sections: dict[str, list[dict[str, Any]]] = yaml.safe_load(_SECTIONS.read_text(encoding="utf-8"))
    return sections


class ChartWriter:
    """Writes the charts of one or several runs, and collects which numbers they show."""

    def __init__(self, runs: Sequence[ChartedRun]) -> None:
        self.runs = runs
        self._keys = list(dict.fromkeys(key for run in runs for key in run.history.keys))
        self._shown_keys: dict[str, tuple[str, ...]] = {}
        self._charted_keys = {"step", "tokens"}  # the x axes

    def figures(self, section: str) -> list[str]:
        """Returns a `<figure>` for each chart of a section; an empty text for one of which no run has numbers."""
        return [self.figure(chart) for values in _sections()[section] for chart in self._expanded(Chart(**values))]

    def other_figures(self) -> list[str]:
        """Returns a `<figure>` for each number of a step that no chart shows, as metrics of plugins."""
        others = [key for key in self._keys if "." not in key and key not in self._charted_keys]
        return [self.figure(Chart(title=key, lines={key: key}, y="value", hides_zeros=True)) for key in others]

    def figure(self, chart: Chart) -> str:
        """Returns a `<figure>`; empty text if no run has its numbers."""
        if not (plot := self.plot(chart)):
            return ""
        return f"<figure{' class=wide' if chart.is_wide else ''}><h3>{escape(chart.title)}</h3>{plot}</figure>"

    def plot(self, chart: Chart) -> str:
        """Returns a chart without a figure around it; empty text if no run has its numbers."""
        self._charted_keys |= set(chart.lines)
        chosen = chart.compared if chart.compared and len(self.runs) > 1 else list(chart.lines)
        drawn_keys = [key for key in chosen if key in self._keys]
        if (
            not drawn_keys
            or (chart.is_range and len(drawn_keys) < 2)
            or (chart.hides_zeros and not self._has_nonzero(drawn_keys))
        ):
            return ""
        if chart.is_range:
            self._shown_keys |= {drawn_keys[0]: ("least",), drawn_keys[1]: ("most",)}
        else:
            self._shown_keys |= dict.fromkeys(drawn_keys, ("mean", "least", "most"))
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
        statistics = (run.history.statistics(key) for run in self.runs for key in keys)
        return any(
            np.nan_to_num([numbers.least_N, numbers.most_N]).any() for numbers in statistics if numbers is not None
        )

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


def overview(history: History, name: str = "") -> str:
    """Returns a map of the latest known loads: layers below each other, experts to the right."""
    latest = next((bucket for bucket in reversed(range(len(history.loads))) if history.loads[bucket]), None)
    if latest is None:
        return ""
    loads = history.loads[latest]
    first = history.firsts[latest]
    last = history.lasts[latest]
    layers = [layer for layer in history.layers() if layer in loads]
    share_RC = np.stack([_share(loads[layer]) for layer in layers])
    rows, experts = share_RC.shape
    height = rows * min(max(_LEAST_ROW, _OVERVIEW / rows), _MOST_ROW)
    steps = f"step {first:,}" + (f" to {last:,}" if last > first else "")
    every = -(-rows // _MOST_NAMES)
    names = [_name(layer) if row % every == 0 else "" for row, layer in enumerate(layers)]
    heat = _heat(relative_shades(share_RC), height, names, is_fixed=True)
    return f"<figure><h3>Load of each expert, {steps}{escape(name)}</h3>{heat}{_ends(experts)}</figure>"


def _ends(experts: int) -> str:
    return f'<div class="ends"><span>expert 0</span><span>expert {experts - 1}</span></div>'


def card(charts: ChartWriter, history: History, layer: str) -> str:
    """Returns a layer's `<figure>`; empty text if nothing is known of it."""
    bias = Chart(
        title=f"{_name(layer)}: bias of the router",
        lines={f"router.{layer}.bias_least": "least bias", f"router.{layer}.bias_most": "greatest bias"},
        colors=[1, 1],
        y="bias",
        from_zero=True,
        is_range=True,
    )
    plot = charts.plot(bias)
    rows = [loads[layer] for loads in history.loads if layer in loads]
    if not rows and not plot:
        return ""
    heat = ""
    if rows:
        experts = len(rows[0])
        height = min(max(experts * _ROW, _LEAST_MAP), _MOST_MAP)
        heat = _heat(relative_shades(_over_time(history, layer, experts)), height, ["expert 0", f"{experts - 1}"])
    return f"<figure><h3>{escape(_name(layer).capitalize())}{_facts(history, layer)}</h3>{heat}{plot}</figure>"


def relative_shades(share_RC: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Palette numbers for loads over their mean; NaN is the mean's."""
    with np.errstate(divide="ignore", invalid="ignore"):
        octaves = np.log2(share_RC)
    octaves = np.clip(np.nan_to_num(octaves, nan=0.0, neginf=-_OCTAVES, posinf=_OCTAVES), -_OCTAVES, _OCTAVES)
    shades: NDArray[np.uint8] = np.rint((octaves + _OCTAVES) / (2 * _OCTAVES) * (_SHADES - 1)).astype(np.uint8)
    return shades


def palette() -> list[tuple[int, int, int]]:
    """Blue for little, nearly white for the mean, red for much."""
    middle = (_SHADES - 1) // 2
    below = [_mixed(_COLD, _EVEN, index / middle) for index in range(middle)]
    return [*below, *(_mixed(_EVEN, _HOT, index / middle) for index in range(middle + 1))]


def legend_gradient() -> str:
    """The palette for CSS, from left to right."""
    return "linear-gradient(to right," + ",".join(f"rgb({red},{green},{blue})" for red, green, blue in palette()) + ")"


def scale() -> str:
    """Returns the legend of maps of loads."""
    return (
        f'<div class="scale">load over the mean: a quarter or less <i style="background:{legend_gradient()}"></i> '
        "four times or more</div>"
    )


def png(shades_RC: NDArray[np.uint8], colors: Sequence[tuple[int, int, int]]) -> bytes:
    """A palette image, one pixel for a number."""
    rows, columns = shades_RC.shape
    header = struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)
    lines = b"".join(b"\0" + row.tobytes() for row in np.ascontiguousarray(shades_RC))
    chunks = (
        (b"IHDR", header),
        (b"PLTE", bytes(value for color in colors for value in color)),
        (b"IDAT", zlib.compress(lines, 9)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, content) for name, content in chunks)


def _heat(shades_RC: NDArray[np.uint8], height: float, names: Sequence[str], *, is_fixed: bool = False) -> str:
    """The map with names to its left; it follows the zoom of the plot below it unless `is_fixed`."""
    content = base64.b64encode(png(shades_RC, palette())).decode()
    labels = "".join(f"<span>{escape(name)}</span>" for name in names)
    return (
        f'<div class="heat{" fixed" if is_fixed else ""}" style="height:{height:g}px"><div class="names">{labels}</div>'
        f'<div class="map"><img alt="" src="data:image/png;base64,{content}"></div></div>'
    )


def _name(layer: str) -> str:
    return layer.replace("_", " ")


def _facts(history: History, layer: str) -> str:
    violation = history.latest(f"router.{layer}.max_violation")
    spread = history.latest(f"router.{layer}.bias_std")
    facts = [] if violation is None else [f"MaxVio {violation:.2f}"]
    facts += [] if spread is None else [f"bias's standard deviation {plain(spread)}"]
    return f" <small>{', '.join(facts)}</small>"


def _share(loads: NDArray[np.float64]) -> NDArray[np.float64]:
    return loads / max(float(loads.mean()), 1e-300)


def _over_time(history: History, layer: str, experts: int) -> NDArray[np.float64]:
    """Returns experts by buckets; a bucket without loads shows those before it."""
    columns: list[NDArray[np.float64]] = []
    for loads in history.loads:
        before = columns[-1] if columns else np.full(experts, np.nan)
        columns.append(_share(loads[layer]) if layer in loads else before)
    return np.stack(columns, axis=1)


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def _mixed(start: tuple[int, int, int], end: tuple[int, int, int], share: float) -> tuple[int, int, int]:
    red, green, blue = (round(first + (last - first) * share) for first, last in zip(start, end, strict=True))
    return red, green, blue


def load_maps_page(
    title: str, tables: Sequence[tuple[str, str, str]], maps_title: str, runs: Mapping[str, DomainLoads]
) -> str:
    """Returns a page of tables (title, HTML, note), and maps of domains by experts for each layer."""
    parts = [f"<h1>{escape(title)}</h1>"]
    parts += [f"<h2>{escape(name)}</h2>{html}<p>{escape(note)}</p>" for name, html, note in tables]
    names = {layer for run in runs.values() for loads in run.values() for layer in loads}
    layers = sorted(names, key=lambda layer: (len(layer), layer))
    if layers:
        parts.append(f"<h2>{escape(maps_title)}</h2>{scale()}")
    for layer in layers:
        figures = []
        for name, run in runs.items():
            share_RC = np.stack([_share(loads[layer]) for loads in run.values()])
            heat = _heat(relative_shades(share_RC), len(run) * _MOST_ROW, [*run], is_fixed=True)
            heading = escape(f"{_name(layer)}, {name}")
            figures.append(f"<figure><h3>{heading}</h3>{heat}{_ends(share_RC.shape[1])}</figure>")
        parts.append(block(figures))
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    return document(title, f"<main>{''.join(parts)}</main>", style, has_images=True)


def evaluation_page(
    title: str,
    facts: Mapping[str, object],
    results: Mapping[str, TaskResult],
    compared: Mapping[str, Mapping[str, PairedComparison]] | None = None,
) -> str:
    """Returns the page, with the comparison of each metric of each task if there is another evaluation."""
    rows = [(name, "" if value is None else str(value)) for name, value in facts.items()]
    parts = [f"<h1>{escape(title)}</h1>", table(("fact", "value"), rows, text=[1])]
    parts += [_task(name, result, (compared or {}).get(name)) for name, result in results.items()]
    return document(title, f"<main>{''.join(parts)}</main>", _STYLE)


def _task(name: str, result: TaskResult, compared: Mapping[str, PairedComparison] | None) -> str:
    parts = [f"<h2>{escape(name)}<small>{result.num_samples:,} samples</small></h2>"]
    parts += [f"<p>{escape(note)}</p>" for note in result.details.notes]
    values = {metric: (estimate.value, estimate.standard_error) for metric, estimate in result.estimates.items()}
    parts.append(_bars("Metrics with standard errors", values))
    if compared:
        differences = {metric: (estimate.difference, estimate.standard_error) for metric, estimate in compared.items()}
        parts.append(_bars("Difference to the other evaluation, with standard errors", differences))
        parts.append(_comparison(compared))
    parts += [_grid(grid) for grid in result.details.grids]
    for result_table in result.details.tables:
        rows = [[_result_cell(value) for value in row] for row in result_table.rows]
        parts.append(f"<h3>{escape(result_table.title)}</h3>{table(result_table.columns, rows)}")
    return "".join(parts)


def _bars(title: str, values: Mapping[str, tuple[float | None, float | None]]) -> str:
    """Returns horizontal bars with whiskers of one standard error to both sides."""
    intervals = {name: (value, error or 0.0) for name, (value, error) in values.items() if value is not None}
    if not intervals:
        return ""
    low = min(0.0, *(value - error for value, error in intervals.values()))
    high = max(0.0, *(value + error for value, error in intervals.values()))
    # Shares are drawn from 0 to 1.
    high = 1.0 if low == 0 and 0.2 < high <= 1 else high
    scale = (_WIDTH - _LABEL - _VALUE) / ((high - low) or 1.0)
    zero = _LABEL - low * scale
    shapes = list[str]()
    for row, (name, (value, error)) in enumerate(intervals.items()):
        y = row * _BAR_HEIGHT
        left, right = sorted((zero, zero + value * scale))
        shapes.append(f'<text x="{_LABEL - 10}" y="{y + 20}" text-anchor="end">{escape(name)}</text>')
        shapes.append(f'<rect class="bar" x="{left:.1f}" y="{y + 7}" width="{right - left:.1f}" height="16" rx="2"/>')
        if error:
            ends = (zero + (value - error) * scale, zero + (value + error) * scale)
            shapes.append(
                f'<path class="whisker" d="M{ends[0]:.1f} {y + 15}H{ends[1]:.1f}M{ends[0]:.1f} {y + 11}v8'
                f'M{ends[1]:.1f} {y + 11}v8"/>'
            )
        text = plain(value) + (f" ± {plain(error)}" if error else "")
        shapes.append(f'<text class="soft" x="{_WIDTH - _VALUE + 12}" y="{y + 20}">{escape(text)}</text>')
    height = len(intervals) * _BAR_HEIGHT
    shapes.append(f'<path class="zero" d="M{zero:.1f} 0V{height}"/>')
    return _figure(title, _WIDTH, height, shapes)


def _grid(grid: ResultGrid) -> str:
    width = _MARGIN + _CELL * len(grid.x) + 10
    height = _CELL * len(grid.y) + 46
    shapes = []
    for row, values in enumerate(grid.values):
        y = row * _CELL
        shapes.append(f'<text x="{_MARGIN - 8}" y="{y + 27}" text-anchor="end">{escape(grid.y[row])}</text>')
        for column, value in enumerate(values):
            x = _MARGIN + column * _CELL
            share = min(max(value or 0.0, 0.0), 1.0)
            shapes.append(
                f'<rect x="{x}" y="{y}" width="{_CELL - 2}" height="{_CELL - 2}" rx="3" stroke="var(--line)" '
                f'fill="var(--c3)" fill-opacity="{0 if value is None else 0.05 + 0.6 * share:.2f}"/>'
            )
            text = "" if value is None else plain(value)
            shapes.append(f'<text x="{x + _CELL / 2 - 1}" y="{y + 26}" text-anchor="middle">{escape(text)}</text>')
    bottom = len(grid.y) * _CELL
    for column, label in enumerate(grid.x):
        middle = _MARGIN + column * _CELL + _CELL / 2 - 1
        shapes.append(f'<text x="{middle}" y="{bottom + 16}" text-anchor="middle">{escape(label)}</text>')
    shapes.append(f'<text class="soft" x="{_MARGIN}" y="{bottom + 36}">{escape(grid.x_name)}</text>')
    shapes.append(f'<text class="soft" x="4" y="14">{escape(grid.y_name)}</text>')
    return _figure(grid.title, width, height, shapes)


def _figure(title: str, width: int, height: int, shapes: Sequence[str]) -> str:
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg width="{width}" height="{height}" role="img" '
        f'viewBox="0 0 {width} {height}" aria-label="{escape(title)}">{"".join(shapes)}</svg></figure>'
    )


def _comparison(compared: Mapping[str, PairedComparison]) -> str:
    columns = ("metric", "difference", "standard error", "95 % interval", "p", "test", "samples")
    rows = [
        [
            metric,
            *(_result_cell(value) for value in (difference.difference, difference.standard_error)),
            ""
            if difference.interval is None
            else f"{plain(difference.interval[0])} to {plain(difference.interval[1])}",
            _result_cell(difference.p_value),
            difference.test.replace("_", " "),
            str(difference.num_samples),
        ]
        for metric, difference in compared.items()
    ]
    return table(columns, rows)


def _result_cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,}" if type(value) is int else plain(value) if isinstance(value, float) else str(value)
