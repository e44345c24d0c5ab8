"""Writes tables of plain text as HTML."""

from collections.abc import Sequence
from html import escape


def table(header: Sequence[str], rows: Sequence[Sequence[str]], text: int | None = None) -> str:
    """Returns a table that scrolls.

    Args:
        rows: cells of each row, plain text.
        text: the column that is wide and reads from the left; None: there is none.
    """
    head = "".join(f'<th{_class(text, place)} scope="col">{escape(name)}</th>' for place, name in enumerate(header))
    body = "".join(
        "<tr>" + "".join(f"<td{_class(text, place)}>{escape(cell)}</td>" for place, cell in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f'<div class="table" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _class(text: int | None, place: int) -> str:
    return ' class="text"' if place == text else ""
