"""Elements of a page: tables of plain text, and data for its script."""

import json
from collections.abc import Sequence
from html import escape


def embedded_json(values: object) -> str:
    """Returns JSON that cannot end a script element; lone surrogates become question marks."""
    text = json.dumps(values, separators=(",", ":"), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    return text.encode("utf-8", "replace").decode("utf-8")


def table(header: Sequence[str], rows: Sequence[Sequence[str]], text: int | None = None) -> str:
    """Returns a table of plain text that scrolls; column `text` is wide and reads from the left."""
    classes = [' class="text"' if number == text else "" for number in range(len(header))]
    titles = zip(classes, header, strict=True)
    head = "".join(f'<th{style} scope="col">{escape(cell)}</th>' for style, cell in titles)
    body = "".join(
        f"<tr>{''.join(f'<td{style}>{escape(cell)}</td>' for style, cell in zip(classes, row, strict=True))}</tr>"
        for row in rows
    )
    return f'<div class="table" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
