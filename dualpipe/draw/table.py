"""Compares schedules in a plain text table and in a self-contained HTML page."""

import textwrap
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

from dualpipe.draw.entry import TimedSchedule, UnavailableSchedule, explanation, number, percent, plain
from dualpipe.draw.style import DEFINITIONS, STYLE, document
from dualpipe.draw.svg import Scale, natural_scale, svg

COLUMNS = ("schedule", "chunks", "overhead", "makespan", "bubble %", "exposed", "peak", "weights", "bound", "above")
MEANING = (
    "chunks: stages of a rank for one direction; overhead: makespan - pure computation of the busiest rank; bubble: "
    "idle part of all ranks' time; exposed: exchange that nothing hides; peak: live activations, of model/P; weights: "
    "copies of the model that the pipeline holds; bound: lower bound of any schedule with this placement; above: "
    "makespan - bound"
)
_MEANING_OF_RUN = (
    "; times in seconds, simulated with the times that each stage's operations took in the run; for another number of "
    "stages the same model is split differently"
)
_GAP = "  "


def cells(entry: TimedSchedule) -> tuple[str, ...]:
    """Returns the text of a schedule for each of `COLUMNS`."""
    shown = dict(zip(COLUMNS[1:], map(number, _values(entry)), strict=True))
    return (entry.schedule.kind, *(shown | {"weights": f"{entry.copies}x"}).values())


def _values(entry: TimedSchedule) -> tuple[float, ...]:
    return (
        entry.chunks,
        entry.overhead,
        entry.simulation.makespan,
        100 * entry.simulation.bubble_fraction,
        entry.exposed,
        entry.peak,
        entry.copies,
        entry.bound.value,
        entry.above_bound,
    )


def table(rows: Sequence[TimedSchedule | UnavailableSchedule], width: int = 100) -> str:
    """Returns one ASCII line per schedule, with numbers or a reason, and the meaning of the columns."""
    shown = {index: cells(row) for index, row in enumerate(rows) if isinstance(row, TimedSchedule)}
    kinds = [row.schedule.kind if isinstance(row, TimedSchedule) else row.kind for row in rows]
    widths = [max(map(len, column)) for column in zip(COLUMNS, *shown.values(), strict=True)]
    widths[0] = max(map(len, (COLUMNS[0], *kinds)))
    lines = [_line(COLUMNS, widths)]
    for index, row in enumerate(rows):
        if isinstance(row, UnavailableSchedule):
            lines += _wrapped(f"- {row.reason}", row.kind.ljust(widths[0]) + _GAP, width)
        else:
            lines.append(_line(shown[index], widths))
    return plain("\n".join([*lines, "", *textwrap.wrap(MEANING, width)]))


def _line(values: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = zip(values, widths, strict=True)
    return _GAP.join([first[0].ljust(first[1]), *(text.rjust(width) for text, width in others)])


def _wrapped(text: str, head: str, width: int) -> list[str]:
    return textwrap.wrap(
        text, max(width, len(head) + 20), initial_indent=head, subsequent_indent=" " * len(head) + "  "
    )


_TEMPLATE, _STYLE, _SCRIPT = (Path(__file__).with_name(f"page.{kind}") for kind in ("html", "css", "js"))


def html(entries: Sequence[TimedSchedule | UnavailableSchedule], title: str = "Pipeline schedules") -> str:
    """Returns the page, which works offline. If a schedule was run, the others are compared with it."""
    shown = [entry for entry in entries if isinstance(entry, TimedSchedule)]
    scale = _common_scale(shown)
    is_run = any(entry.measured for entry in shown)
    body = Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(title),
        definitions=DEFINITIONS,
        header="".join(_head_cell(name, is_sorted=is_run and name == "makespan") for name in COLUMNS),
        rows="\n".join(_table_row(index, entry, has_run=is_run) for index, entry in enumerate(entries)),
        explanation=explanation(shown),
        meaning=escape(MEANING + (_MEANING_OF_RUN if is_run else "")),
        comparison=_comparison(shown),
        figures="\n".join(_figure(index, entry, scale, has_run=is_run) for index, entry in _run_first(entries)),
    )
    return document(title, body, STYLE + _STYLE.read_text(encoding="utf-8"), _SCRIPT.read_text(encoding="utf-8"))


def _common_scale(shown: Sequence[TimedSchedule]) -> Scale:
    scales = [natural_scale(entry.schedule, entry.simulation, entry.measured) for entry in shown]
    pixels = max((scale.pixels for scale in scales), default=0.0)
    return Scale.within_limits(pixels=pixels, span=max((scale.span for scale in scales), default=0.0))


def _head_cell(name: str, *, is_sorted: bool) -> str:
    order = ' aria-sort="ascending"' if is_sorted else ""
    return f'<th scope="col"{order}><button type="button">{escape(name)}</button></th>'


def _run_first(entries: Sequence[TimedSchedule | UnavailableSchedule]) -> list[tuple[int, TimedSchedule]]:
    """Returns the drawn schedules with their indices in the table; the one that was run comes first."""
    drawn = [(index, entry) for index, entry in enumerate(entries) if isinstance(entry, TimedSchedule)]
    return sorted(drawn, key=lambda each: each[1].measured is None)


def _comparison(shown: Sequence[TimedSchedule]) -> str:
    """Returns a sentence on the schedule that was run and the shortest other one; empty if none was run."""
    run = next((entry for entry in shown if entry.measured is not None), None)
    others = [entry for entry in shown if entry is not run]
    if run is None or not others:
        return ""
    best = min(others, key=lambda entry: entry.simulation.makespan)
    planned = run.simulation.makespan
    change = best.simulation.makespan / planned - 1 if planned else 0.0
    words = "as long" if abs(change) < 5e-4 else f"{percent(abs(change))} {'longer' if change > 0 else 'shorter'}"
    return (
        f"<p>This run uses {escape(run.schedule.kind)}. Under the same costs, the shortest other schedule is "
        f"{escape(best.schedule.kind)}: its makespan is {words}.</p>"
    )


def _table_row(index: int, entry: TimedSchedule | UnavailableSchedule, *, has_run: bool) -> str:
    if isinstance(entry, UnavailableSchedule):
        reason = f'<td class="reason" colspan="{len(COLUMNS) - 1}">{escape(entry.reason)}</td>'
        return f'<tr class="absent"><td>{escape(entry.kind)}</td>{reason}</tr>'
    name, *shown = cells(entry)
    is_run = entry.measured is not None
    checked = "" if has_run and not is_run else " checked"
    label = f"{escape(name)}{' (this run)' if is_run else ''}"
    box = f'<label><input type="checkbox"{checked} data-figure="{_identity(index)}"> {label}</label>'
    numbers = zip(shown, _values(entry), strict=True)
    values = "".join(f'<td data-value="{value:.17g}">{text}</td>' for text, value in numbers)
    return f'<tr class="shown{" run" if is_run else ""}"><td>{box}</td>{values}</tr>'


def _figure(index: int, entry: TimedSchedule, scale: Scale, *, has_run: bool) -> str:
    picture = svg(entry.schedule, entry.simulation, entry.measured, bound=entry.bound, scale=scale, standalone=False)
    name = escape(f"timeline of {entry.schedule.kind}, scrolls")
    hidden = " hidden" if has_run and entry.measured is None else ""
    return f'<figure id="{_identity(index)}" tabindex="0" role="region" aria-label="{name}"{hidden}>{picture}</figure>'


def _identity(index: int) -> str:
    return f"schedule-{index}"
