"""Schedules side by side as plain text: one line per kind."""

import textwrap
from collections.abc import Sequence

from dualpipe.draw.entry import Absent, Entry
from dualpipe.draw.words import number, plain

COLUMNS = ("schedule", "overhead", "makespan", "bubble %", "exposed", "peak", "bound", "above")
MEANING = (
    "overhead: makespan - pure computation of the busiest rank; bubble: idle part of all ranks' time; exposed: "
    "exchange that nothing hides; peak: live activations, of model/P; bound: no schedule takes less; above: makespan - "
    "bound"
)
_GAP = "  "


def cells(entry: Entry) -> tuple[str, ...]:
    """A schedule's text in each of `COLUMNS`."""
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


def table(rows: Sequence[Entry | Absent], width: int = 100) -> str:
    """One line per schedule, in the order given, and what the columns mean. ASCII only, no trailing newline.

    A kind that cannot be shown has its reason in place of the numbers, wrapped to `width` columns.
    """
    shown = {index: cells(row) for index, row in enumerate(rows) if isinstance(row, Entry)}
    kinds = [row.schedule.kind if isinstance(row, Entry) else row.kind for row in rows]
    widths = [max(map(len, column)) for column in zip(COLUMNS, *shown.values(), strict=True)]
    widths[0] = max(map(len, (COLUMNS[0], *kinds)))
    lines = [_line(COLUMNS, widths)]
    for index, row in enumerate(rows):
        if isinstance(row, Absent):
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
