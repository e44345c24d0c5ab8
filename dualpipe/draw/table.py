"""Schedules side by side: as a plain table, one line per kind, and as one HTML page that needs nothing else."""

import textwrap
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

from dualpipe.draw.entry import TimedSchedule, UnavailableSchedule, number, plain
from dualpipe.draw.style import DEFINITIONS, STYLE
from dualpipe.draw.svg import Scale, natural_scale, svg

COLUMNS = ("schedule", "overhead", "makespan", "bubble %", "exposed", "peak", "bound", "above")
MEANING = (
    "overhead: makespan - pure computation of the busiest rank; bubble: idle part of all ranks' time; exposed: "
    "exchange that nothing hides; peak: live activations, of model/P; bound: no schedule takes less; above: makespan - "
    "bound"
)
_GAP = "  "


def cells(entry: TimedSchedule) -> tuple[str, ...]:
    """Returns a schedule's text in each of `COLUMNS`."""
    return (
        entry.schedule.kind,
        number(entry.overhead),
        number(entry.simulation.makespan),
        f"{100 * entry.simulation.bubble_fraction:.2f}",
        number(entry.exposed),
        number(entry.peak),
        number(entry.bound.value),
        number(entry.above_bound),
    )


def table(rows: Sequence[TimedSchedule | UnavailableSchedule], width: int = 100) -> str:
    """Returns one line per schedule, in the order given, and what the columns mean. ASCII only, no trailing newline.

    A kind that cannot be shown has its reason in place of the numbers, wrapped to `width` columns.
    """
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


def _line(texts: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = zip(texts, widths, strict=True)
    return _GAP.join([first[0].ljust(first[1]), *(text.rjust(width) for text, width in others)])


def _wrapped(text: str, head: str, width: int) -> list[str]:
    return textwrap.wrap(
        text, max(width, len(head) + 20), initial_indent=head, subsequent_indent=" " * len(head) + "  "
    )


_TEMPLATE = Path(__file__).with_name("page.html")


def html(entries: Sequence[TimedSchedule | UnavailableSchedule], title: str = "Pipeline schedules") -> str:
    """Returns the page, to be read from a file or a server, offline.

    Its table sorts by any column, its boxes show and hide pictures, pointing at an operation names it.

    Args:
        entries: in the order in which they are shown; their costs have one unit. An absent one is a line of the table.
        title: of the page, plain text.
    """
    shown = [entry for entry in entries if isinstance(entry, TimedSchedule)]
    scale = _common_scale(shown)
    return Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(title),
        style=STYLE,
        definitions=DEFINITIONS,
        header="".join(f'<th scope="col"><button type="button">{escape(name)}</button></th>' for name in COLUMNS),
        rows="\n".join(_row(index, entry) for index, entry in enumerate(entries)),
        meaning=escape(MEANING + ("; times in seconds" if any(entry.measured for entry in shown) else "")),
        figures="\n".join(
            _figure(index, entry, scale) for index, entry in enumerate(entries) if isinstance(entry, TimedSchedule)
        ),
    )


def _common_scale(shown: Sequence[TimedSchedule]) -> Scale:
    """Returns the widest picture's pixels per unit of time, over the longest one's time."""
    scales = [natural_scale(entry.schedule, entry.simulation, entry.measured) for entry in shown]
    pixels = max((scale.pixels for scale in scales), default=0.0)
    return Scale.within_limits(pixels=pixels, span=max((scale.span for scale in scales), default=0.0))


def _row(index: int, entry: TimedSchedule | UnavailableSchedule) -> str:
    if isinstance(entry, UnavailableSchedule):
        reason = f'<td class="reason" colspan="{len(COLUMNS) - 1}">{escape(entry.reason)}</td>'
        return f'<tr class="absent"><td>{escape(entry.kind)}</td>{reason}</tr>'
    name, *numbers = cells(entry)
    box = f'<label><input type="checkbox" checked data-figure="{_identity(index)}"> {escape(name)}</label>'
    values = "".join(f'<td data-value="{text}">{text}</td>' for text in numbers)
    return f'<tr class="shown"><td>{box}</td>{values}</tr>'


def _figure(index: int, entry: TimedSchedule, scale: Scale) -> str:
    picture = svg(entry.schedule, entry.simulation, entry.measured, bound=entry.bound, scale=scale, standalone=False)
    return f'<figure id="{_identity(index)}">{picture}</figure>'


def _identity(index: int) -> str:
    return f"schedule-{index}"
