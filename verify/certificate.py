"""Writes what a verification found: one line per check, `certificate.json` and `certificate.html`."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from html import escape
from typing import Any

from base.decode import encode
from base.files import replace_text
from train.files.run_files import redact
from train.start.startup import identity_of, is_version
from verify.checks import CheckEntry, Outcome, Verification

JSON_NAME = "certificate.json"
PAGE_NAME = "certificate.html"
_NOT_CHECKED = (
    "arithmetic that one rank and many share: attention, rotation, router, losses (launch.golden compares it)",
    "tasks other than pretraining: frozen networks, rollouts, loss weights",
    "FP8 products, and kernels that only the configured sizes choose",
    "rates of transfers and of the dispatcher, and a token over dispatch.max_nodes with dispatch=deepep",
)
_STYLE = """
:root{color-scheme:light dark;font:15px/1.45 system-ui,sans-serif}
body{max-width:72rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;width:100%;margin:1rem 0}
th,td{text-align:left;padding:.35rem .6rem;border-bottom:1px solid #8885;vertical-align:top;overflow-wrap:break-word}
th,td:nth-child(-n+2){white-space:nowrap}
.passed{color:#1a7f37}.failed{color:#cf222e;font-weight:600}.not{opacity:.6}
.wide{overflow-x:auto}td.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
"""


class Certificate:
    """The certificate of a verification, which rank 0 rewrites after each check."""

    def __init__(self, verification: Verification, entries: Sequence[CheckEntry]) -> None:
        self._verification = verification
        self._about = {entry.name: entry.about for entry in entries}
        self._outcomes: list[Outcome] = []
        self._started = time.perf_counter()
        config = verification.config
        self._facts = {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "name": config.name,
            "versions": {key: text for key, text in identity_of(config).items() if is_version(key)},
            "layout": encode(config.parallelism),
            "cluster": encode(config.cluster),
            "layouts": [f"{trial.name}: {trial}" for trial in verification.trials],
            "not_checked": list(_NOT_CHECKED),
        }

    def add(self, outcome: Outcome) -> None:
        """Prints and records an outcome."""
        self._outcomes.append(outcome)
        print(redact(str(outcome)), flush=True)
        self._write("incomplete")

    def close(self) -> None:
        """Completes the files and prints the verdict in one line."""
        failed = [outcome for outcome in self._outcomes if outcome.verdict == "failed"]
        self._write("failed" if failed else "passed")
        place = self._verification.folder / JSON_NAME
        if failed:
            print(redact(f"failed: {failed[0].check}: {failed[0].summary}; {place}"), flush=True)
        else:
            seconds = time.perf_counter() - self._started
            print(f"verified: {len(self._outcomes)} checks passed in {seconds:.0f} s; {place}", flush=True)

    def _write(self, verdict: str) -> None:
        values = {
            "verdict": verdict,
            **self._facts,
            "seconds": round(time.perf_counter() - self._started, 1),
            "devices": [asdict(place) for place in self._verification.places],
            "rates": self._verification.rates,
            "checks": [{"about": self._about[one.check], **asdict(one)} for one in self._outcomes],
        }
        text = redact(json.dumps(values, indent=1))
        replace_text(self._verification.folder / JSON_NAME, f"{text}\n")
        replace_text(self._verification.folder / PAGE_NAME, page_of(json.loads(text)))


def page_of(values: dict[str, Any]) -> str:
    """Returns the HTML page of a certificate."""
    checks = [
        [
            _cell(check["verdict"], str(check["verdict"]).split()[0]),
            _cell(check["check"]),
            _cell(check["about"]),
            _cell(check["summary"]),
            _number(check["measured"]),
            _number(check["tolerance"]),
            _number(check["seconds"]),
        ]
        for check in values["checks"]
    ]
    failures = [
        [_cell(check["check"]), *(_cell(failure[key]) for key in ("rank", "subject", "difference", "cause"))]
        for check in values["checks"]
        for failure in check["failures"]
    ]
    devices = [
        [_cell(place[key]) for key in ("rank", "local_rank", "host", "device_type", "device")]
        for place in values["devices"]
    ]
    parts = [
        f"<h1>Verification of {escape(values['name'])}: "
        f"<span class={str(values['verdict']).split()[0]}>{escape(values['verdict'])}</span></h1>",
        f"<p>{escape(values['created'])}, {values['seconds']} s, {escape(_listed(values['layout']))}</p>",
        _table(("verdict", "check", "about", "result", "measured", "tolerance", "seconds"), checks),
        "<h2>Failures</h2>" + _table(("check", "rank", "subject", "difference", "likely cause"), failures)
        if failures
        else "",
        *(
            _facts(name.capitalize().replace("_", " "), values[name])
            for name in ("rates", "versions", "layouts", "not_checked")
            if values[name]
        ),
        "<h2>Devices</h2>" + _table(("rank", "local rank", "host", "type", "device"), devices),
    ]
    title = escape(f"Verification of {values['name']}")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>'
        f"<body>{''.join(parts)}</body></html>\n"
    )


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _facts(title: str, facts: dict[str, Any] | list[str]) -> str:
    items = facts.items() if isinstance(facts, dict) else enumerate(facts, 1)
    return f"<h2>{escape(title)}</h2>" + _table(("", ""), [[_cell(key), _cell(value)] for key, value in items])


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in header) if any(header) else ""
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(value: object, kind: str = "") -> str:
    text = "all" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return f'<td class="{escape(kind)}">{escape(text)}</td>'


def _number(value: float | None) -> str:
    return f'<td class="number">{"" if value is None else f"{value:.3g}"}</td>'
