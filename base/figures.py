"""Numbers and tables for people. Numbers have at most three significant digits.

A report's script writes a chart's values the same way, and its readings with four: a long loss changes in the fourth.
"""

import json
import math
from collections.abc import Collection, Sequence
from html import escape
from typing import Literal

_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def plain(value: float) -> str:
    """Returns a number as in `0.33`, `1,800`, `3e-05`."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 1000 else f"{rounded:.3g}"


def count(value: float) -> str:
    """Returns a step number with all its digits, as in `12,345`."""
    return f"{value:,.0f}"


def short(value: float) -> str:
    """Returns a number with a letter for thousands and more, as in `3.15M`."""
    if not math.isfinite(value):
        return str(value)
    rounded = float(f"{value:.3g}")
    for size, letter in _UNITS:
        if abs(rounded) >= size:
            return f"{rounded / size:.3g}{letter}"
    return f"{rounded:.3g}"


def bytes_text(value: float) -> str:
    """Returns a number of bytes as in `3.15 MB`."""
    text = short(value)
    return f"{text[:-1]} {text[-1]}B" if text[-1].isalpha() else f"{text} B"


def seconds(value: float) -> str:
    """Returns a time as in `1.25 s`, `340 ms`."""
    return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def percent(value: float) -> str:
    """Returns a share as in `5.5 %`."""
    return f"{100 * value:.3g} %"


def embedded_json(values: object) -> str:
    """Returns JSON that cannot end a script element; lone surrogates become question marks."""
    text = json.dumps(values, separators=(",", ":"), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    return text.encode("utf-8", "replace").decode("utf-8")


class Html(str):
    """Text of a cell that is HTML already."""


def table(header: Sequence[str], rows: Sequence[Sequence[str]], text: Collection[int] = (), label: str = "") -> str:
    """Returns a table that scrolls, from cells of text or `Html`.

    Columns in `text` are aligned left and wrap.
    """
    name = f' role="region" aria-label="{escape(label)}"' if label else ""
    head = _row("th", header, text) if any(header) else ""
    body = "".join(_row("td", row, text) for row in rows)
    return f'<div class="table" tabindex="0"{name}><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'


def _row(tag: Literal["th", "td"], cells: Sequence[str], text: Collection[int]) -> str:
    scope = ' scope="col"' if tag == "th" else ""
    written = []
    for column, cell in enumerate(cells):
        style = ' class="text"' if column in text else ""
        written.append(f"<{tag}{style}{scope}>{cell if isinstance(cell, Html) else escape(cell)}</{tag}>")
    return f"<tr>{''.join(written)}</tr>"


def aligned(rows: Sequence[Sequence[str]], text: Collection[int] = (), gap: str = "  ") -> list[str]:
    """Returns the rows of a table as lines. Columns in `text` are aligned left, all others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    pads = [str.ljust if column in text else str.rjust for column in range(len(widths))]
    lines = (gap.join(pad(cell, width) for pad, cell, width in zip(pads, row, widths, strict=True)) for row in rows)
    return [line.rstrip() for line in lines]
