"""Writes records of a plan's JSON as tables of plain text, with the units that their keys name."""

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from train.report.figures import num_bytes, plain, seconds

_MOST_ROWS = 500
_NAMES = {
    "optimiser_bytes": "optimizer",
    "optimiser_seconds": "optimizer",
    "rows": "by gain",
    "unknown": "not computed",
    "mfu": "MFU",
    "tokens_per_second_per_gpu": "tokens/s/GPU",
    "gpu_hours": "GPU-hours",
    "kilowatt_hours": "kWh",
    "gpu_hours_per_trillion_tokens": "GPU-hours/1T",
}
_LONG = 24
"""Characters from which a text wraps."""


def records_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Returns a table of records; nested keys are joined, and columns without a value are left out."""
    flat = [dict(_leaves(_with_short_layout(record), "")) for record in records[:_MOST_ROWS]]
    keys = [key for key in dict.fromkeys(key for each in flat for key in each) if _is_known(flat, key)]
    if not keys:
        return ""
    rows = [[shown(key, each.get(key)) for key in keys] for each in flat]
    left_out = len(records) - len(flat)
    note = f"<p>{left_out:,} more are left out.</p>" if left_out else ""
    return _table([column_name(key) for key in keys], rows) + note


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table that scrolls, in which columns with long cells read from the left and wrap."""
    styles = [' class="text"' if any(len(row[place]) > _LONG for row in rows) else "" for place in range(len(header))]
    head = "".join(f'<th{style} scope="col">{escape(name)}</th>' for style, name in zip(styles, header, strict=True))
    body = "".join(
        f"<tr>{''.join(f'<td{style}>{escape(cell)}</td>' for style, cell in zip(styles, row, strict=True))}</tr>"
        for row in rows
    )
    return f'<div class="table" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def any_value(value: object) -> str:
    """Returns a value of unknown form: records as a table, other lists as a list, a mapping part by part."""
    match value:
        case None:
            return ""
        case list() if all(isinstance(each, Mapping) for each in value):
            return records_table(value)
        case list():
            items = (escape(shown("", each)) for each in value[:_MOST_ROWS])
            return f"<ul>{''.join(f'<li>{item}</li>' for item in items)}</ul>"
        case Mapping():
            plain_values = {key: each for key, each in value.items() if not isinstance(each, list | Mapping)}
            facts = "".join(
                f"<div><dt>{escape(column_name(key))}</dt><dd>{escape(shown(key, each))}</dd></div>"
                for key, each in plain_values.items()
                if each is not None
            )
            parts = "".join(
                f"<h3>{escape(column_name(key))}</h3>{content}"
                for key, each in value.items()
                if key not in plain_values and (content := any_value(each))
            )
            return (f"<dl>{facts}</dl>" if facts else "") + parts
        case _:
            return f"<p>{escape(shown('', value))}</p>"


def column_name(key: str) -> str:
    """Returns the words of a key without its unit, as in `step` for `time.step_seconds`.

    Args:
        key: dotted key of a record.
    """
    last = key.rpartition(".")[2]
    if last in _NAMES:
        return _NAMES[last]
    for unit in ("_seconds", "_bytes", "_bytes_per_second"):
        last = last.removesuffix(unit)
    return last.replace("_", " ").replace("gpu", "GPU")


def shown(key: str, value: object) -> str:
    """Returns a value as plain text with the unit that its key names.

    Args:
        key: dotted key of a record.
    """
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case str():
            return value
        case list():
            return " ".join(shown("", each) for each in value)
        case int() | float():
            return _number(key, value)
        case _:
            return str(value)


def _number(key: str, value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    if key.endswith("_bytes_per_second"):
        return f"{num_bytes(value)}/s"
    if key.endswith("_bytes"):
        return num_bytes(value)
    if key.endswith("_seconds"):
        return f"{value:,.4g} s" if 1 <= value < 1000 else seconds(value) if value < 1 else f"{value:,.0f} s"
    if key.endswith(("mfu", "share", "gain")):
        return f"{100 * value:.1f} %"
    if key.endswith("tokens"):
        return f"{value / 1e9:,.1f} billion" if value >= 1e9 else f"{value:,.0f}"
    if key.endswith(("hours", "dollars", "days")):
        return f"{value:,.0f}" if abs(value) >= 100 else plain(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _with_short_layout(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a record whose layout, if it has one, is one line of text."""
    layout = record.get("layout")
    if not isinstance(layout, Mapping):
        return record
    known = {
        **{axis: f"{axis} {layout[axis]}" for axis in ("pipeline", "data", "expert") if axis in layout},
        "chunks": f"{layout.get('chunks')} chunks" if layout.get("chunks") not in (None, 1) else "",
        "batches": f"{layout.get('num_micro_batches')} x {layout.get('micro_batch_sequences')} sequences",
        "recompute": f"recompute {shown('', layout['recompute']) or 'nothing'}" if "recompute" in layout else "",
        **{key: str(layout[key]) for key in ("schedule", "precision", "dispatch") if key in layout},
    }
    return {**record, "layout": ", ".join(text for text in known.values() if text)}


def _leaves(record: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _is_known(records: Sequence[Mapping[str, Any]], key: str) -> bool:
    return any(record.get(key) not in (None, "", []) for record in records)
