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
div{overflow-x:auto}
table{border-collapse:collapse;margin:1rem 0}
th,td{text-align:right;padding:.35rem .6rem;border-bottom:1px solid #8885;font-variant-numeric:tabular-nums}
th:first-child,td:first-child{text-align:left;white-space:nowrap}
"""


def write_page(folder: Path, report: Mapping[str, Any]) -> Path:
    """Writes `report.html` from the values of `prepare.json`, and returns its path."""
    sources: Mapping[str, Mapping[str, Any]] = report[SOURCES_NAME]
    total = sum(source["tokens"] for source in sources.values()) or 1
    sizes = [
        {
            "source": name,
            "text": bytes_text(source["text_bytes"]),
            "tokens": f"{source['tokens']:,}",
            "bytes per token": f"{source['text_bytes'] / source['tokens']:.2f}" if source["tokens"] else "-",
            "share of tokens": f"{source['tokens'] / total:.1%}",
        }
        for name, source in sources.items()
    ]
    documents = [
        {
            "source": name,
            "read": f"{source['documents_read']:,}",
            "kept": f"{source['documents_kept']:,}",
            "share kept": f"{source['documents_kept'] / max(source['documents_read'], 1):.1%}",
            **{reason.replace("_", " "): f"{count:,}" for reason, count in source["dropped"].items()},
            **{part: f"{source[part]['documents']:,}" for part in PARTS},
        }
        for name, source in sources.items()
    ]
    facts = {
        "sequence length": f"{report['sequence_length_tokens']:,} tokens",
        "vocabulary": f"{report['vocab_size']:,} tokens of {8 * int(report['token_dtype'][-1])} bits",
        "units": f"{report['units']['total']:,} of about {bytes_text(report['unit_bytes'])}",
        "units built by the last command": f"{report['units']['built']:,} in {seconds_text(report['seconds'])}",
        "peak memory of a process": bytes_text(report["peak_rss_bytes"]),
    }
    tables = {"Tokens": sizes, "Documents": documents, "Folder": [{"": key, " ": facts[key]} for key in facts]}
    title = escape(f"Prepared text: {folder.name}")
    body = "".join(f"<h2>{name}</h2><div>{_table(rows)}</div>" for name, rows in tables.items())
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>'
        f"<body><h1>{title}</h1>{body}</body></html>\n"
    )
    replace_file(folder / PAGE_NAME, page.encode("utf-8", errors="replace"))
    return folder / PAGE_NAME


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in rows[0])
    body = "".join(f"<tr>{''.join(f'<td>{escape(row[name])}</td>' for name in rows[0])}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
