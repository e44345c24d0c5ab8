"""Writes the page of a prepared folder: what was kept of each source, and dropped. Imports no torch."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from data.progress import bytes_text, seconds_text
from data.shards import PARTS, SOURCES_NAME, replace_file

PAGE_NAME = "report.html"
_STYLE = """
:root{color-scheme:light dark;font:15px/1.45 system-ui,sans-serif}
body{max-width:80rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;margin:1rem 0}
th,td{text-align:right;padding:.35rem .6rem;border-bottom:1px solid #8885;font-variant-numeric:tabular-nums}
th:first-child,td:first-child{text-align:left;white-space:nowrap}
.wide{overflow-x:auto}
.bar{display:flex;height:.9rem;width:9rem;background:#8883;border-radius:3px;overflow:hidden}
.bar i{background:#cf222e}.bar b{background:#1a7f37}
"""


def write_page(folder: Path, report: Mapping[str, Any]) -> Path:
    """Writes `report.html` from the values of `prepare.json`, and returns its path."""
    replace_file(folder / PAGE_NAME, page_of(folder.name, report).encode("utf-8", errors="replace"))
    return folder / PAGE_NAME


def page_of(name: str, report: Mapping[str, Any]) -> str:
    """Returns the page of a folder with a name."""
    sources: Mapping[str, Mapping[str, Any]] = report[SOURCES_NAME]
    facts = [
        ("sequence length", f"{report['sequence_length_tokens']:,} tokens"),
        ("vocabulary", f"{report['vocab_size']:,} tokens of {8 * int(report['token_dtype'][-1])} bits"),
        ("units", f"{report['units']['total']:,} of about {bytes_text(report['unit_bytes'])}"),
        ("units built by the last command", f"{report['units']['built']:,} in {seconds_text(report['seconds'])}"),
        ("peak memory of a process", bytes_text(report["peak_rss_bytes"])),
    ]
    title = escape(f"Prepared text: {name}")
    parts = [
        f"<h1>{title}</h1>",
        _table(["source", "text", "tokens", "bytes per token", "share of tokens"], _size_rows(sources)),
        "<h2>Documents</h2>",
        _table(["source", "read", "kept", "", *_reasons(sources), *PARTS], _document_rows(sources)),
        "<h2>Folder</h2>",
        _table([], [[_cell(key), _cell(value)] for key, value in facts]),
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>'
        f"<body>{''.join(parts)}</body></html>\n"
    )


def _size_rows(sources: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    total = sum(source["tokens"] for source in sources.values()) or 1
    return [
        [
            _cell(name),
            _cell(bytes_text(source["text_bytes"])),
            _cell(f"{source['tokens']:,}"),
            _cell(f"{source['text_bytes'] / source['tokens']:.2f}" if source["tokens"] else "-"),
            _cell(f"{100 * source['tokens'] / total:.1f} %"),
        ]
        for name, source in sources.items()
    ]


def _reasons(sources: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(reason for source in sources.values() for reason in source["dropped"]))


def _document_rows(sources: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    rows = []
    for name, source in sources.items():
        kept = 100 * source["documents_kept"] / max(source["documents_read"], 1)
        bar = (
            f'<div class="bar" title="{kept:.1f} % kept"><b style="width:{kept:.2f}%"></b><i style="flex:1"></i></div>'
        )
        counts = [*(source["dropped"].get(reason, 0) for reason in _reasons(sources))]
        counts += [source[part]["documents"] for part in PARTS]
        rows.append(
            [
                _cell(name),
                _cell(f"{source['documents_read']:,}"),
                _cell(f"{source['documents_kept']:,}"),
                f"<td>{bar}</td>",
                *(_cell(f"{count:,}") for count in counts),
            ]
        )
    return rows


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(text.replace('_', ' '))}</th>" for text in header)
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(text: str) -> str:
    return f"<td>{escape(text)}</td>"
