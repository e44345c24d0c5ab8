"""Writes the results of an evaluation as one self-contained page. Imports no torch."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from dualpipe.draw.style import document
from infer.evaluate.protocol import ResultGrid
from infer.evaluate.run import TaskResult
from infer.evaluate.statistics import PairedComparison
from train.figures import plain, table

EVALUATION_PAGE_NAME = "report.html"
_WIDTH = 720
_BAR_HEIGHT = 30
_LABEL = 190
_VALUE = 150
_CELL = 44
_MARGIN = 110


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


_STYLE = """
.bar{fill:var(--c1)}.whisker{stroke:var(--ink);stroke-width:1.5}.zero{stroke:var(--line)}
svg text{fill:var(--ink);font-size:12.5px}svg .soft{fill:var(--soft)}svg{max-width:100%;height:auto}
.table{border:0}.table table{width:auto}figure{margin:8px 0 18px;border:0}figcaption{font-weight:600;margin-bottom:6px}
"""


def _task(name: str, result: TaskResult, compared: Mapping[str, PairedComparison] | None) -> str:
    parts = [f"<h2>{escape(name)}<small>{result.num_samples:,} samples</small></h2>"]
    parts += [f"<p>{escape(note)}</p>" for note in result.details.notes]
    values = {metric: (each.value, each.standard_error) for metric, each in result.estimates.items()}
    parts.append(_bars("Metrics with standard errors", values))
    if compared:
        differences = {metric: (each.difference, each.standard_error) for metric, each in compared.items()}
        parts.append(_bars("Difference to the other evaluation, with standard errors", differences))
        parts.append(_comparison(compared))
    parts += [_grid(grid) for grid in result.details.grids]
    for found in result.details.tables:
        rows = [[_result_cell(value) for value in row] for row in found.rows]
        parts.append(f"<h3>{escape(found.title)}</h3>{table(found.columns, rows)}")
    return "".join(parts)


def _bars(title: str, values: Mapping[str, tuple[float | None, float | None]]) -> str:
    """Returns horizontal bars with whiskers of one standard error to both sides."""
    known = {name: (value, error or 0.0) for name, (value, error) in values.items() if value is not None}
    if not known:
        return ""
    low = min(0.0, *(value - error for value, error in known.values()))
    high = max(0.0, *(value + error for value, error in known.values()))
    # Shares are drawn from 0 to 1.
    high = 1.0 if low == 0 and 0.2 < high <= 1 else high
    scale = (_WIDTH - _LABEL - _VALUE) / ((high - low) or 1.0)
    zero = _LABEL - low * scale
    shapes = list[str]()
    for row, (name, (value, error)) in enumerate(known.items()):
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
    height = len(known) * _BAR_HEIGHT
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
            *(_result_cell(value) for value in (each.difference, each.standard_error)),
            "" if each.interval is None else f"{plain(each.interval[0])} to {plain(each.interval[1])}",
            _result_cell(each.p_value),
            each.test.replace("_", " "),
            str(each.num_samples),
        ]
        for metric, each in compared.items()
    ]
    return table(columns, rows)


def _result_cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,}" if type(value) is int else plain(value) if isinstance(value, float) else str(value)
