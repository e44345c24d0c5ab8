"""Numbers for people, with at most three significant digits.

The page's script writes a chart's values the same way, and its readings with four: a long loss changes in the fourth.
"""

import json
import math
from collections.abc import Collection, Sequence
from html import escape

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
    for size, letter in _UNITS:
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def num_bytes(value: float) -> str:
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


def table(header: Sequence[str], rows: Sequence[Sequence[str]], text: Collection[int] = ()) -> str:
    """Returns a table of plain text that scrolls; the columns `text` read from the left and wrap."""
    classes = [' class="text"' if number in text else "" for number in range(len(header))]
    titles = zip(classes, header, strict=True)
    head = "".join(f'<th{style} scope="col">{escape(cell)}</th>' for style, cell in titles)
    body = "".join(
        f"<tr>{''.join(f'<td{style}>{escape(cell)}</td>' for style, cell in zip(classes, row, strict=True))}</tr>"
        for row in rows
    )
    return f'<div class="table" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
