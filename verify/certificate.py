"""Writes what a verification found: one line per check, `certificate.json` and `certificate.txt`."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from base.decode import encode
from base.figures import aligned, plain
from base.files import replace_text
from train.config import TaskConfig
from train.files.run_files import redact
from train.start.startup import identity_of, is_version
from train.tasks.registry import TASKS
from verify.checks import CheckEntry, Failure, Outcome, Verification
from verify.layouts import takes_task

JSON_NAME = "certificate.json"
TEXT_NAME = "certificate.txt"
_NOT_CHECKED = (
    "arithmetic that one rank and many share: attention, rotation, router, losses (launch.golden compares it)",
    "rollouts and their answers, a teacher as a network, and tasks other than pretraining in random layouts",
    "FP8 products, and kernels that only the configured sizes choose",
    "rates of transfers and of the dispatcher, and a token over dispatch.max_nodes with dispatch=deepep",
)


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
            "not_checked": [*_NOT_CHECKED, *missing_task(config.task)],
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
        replace_text(self._verification.folder / TEXT_NAME, f"{_text_of(json.loads(text))}\n")


def missing_task(task: TaskConfig) -> list[str]:
    """Returns what a certificate says of a task that small runs cannot take; nothing for others."""
    values = ", ".join(TASKS.get(task.kind).values)
    return [] if takes_task(task) else [f"task={task.kind}, which reads {values} of tokens; small runs pretrain"]


def _text_of(values: dict[str, Any]) -> str:
    """Returns the text of a certificate."""
    header = ("verdict", "check", "seconds", "measured", "tolerance", "result")
    rows = [
        [check["verdict"], check["check"], *(_number(check[key]) for key in header[2:5]), check["summary"]]
        for check in values["checks"]
    ]
    failures = [f"{check['check']}: {Failure(**one)}" for check in values["checks"] for one in check["failures"]]
    lists = {
        "failures": failures,
        "devices": [", ".join(f"{key} {value}" for key, value in place.items()) for place in values["devices"]],
        **{key: [f"{name}: {value}" for name, value in values[key].items()] for key in ("rates", "versions")},
        **{key: values[key] for key in ("layouts", "not_checked")},
    }
    lines = [f"{values['verdict']}: verification of {values['name']}, {values['created']}"]
    lines += aligned([header, *rows], text=(0, 1, 5))
    for name, entries in lists.items():
        lines += ["", name, *entries]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "" if value is None else plain(value)
