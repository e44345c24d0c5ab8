"""Writes and reads `events.jsonl`: a run's events other than steps, one a line. No torch here."""

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from train.records.json_lines import read_lines
from train.records.secrets import redact

EVENTS_NAME = "events.jsonl"
LOGGER = logging.getLogger("train")


def append_event(out_dir: Path, kind: str, step: int, text: str, **values: Any) -> None:
    """Appends an event to the file.

    Args:
        kind: kind of event: `skipped`, `rolled_back`, `skipped_after_rollback`, `stopped`, `preempted`, `restarted`,
            `checkpoint_rejected`, `lock_taken_over`, `folder_lost`, `output_broken`, `rescued`, `no_verdict`.
        step: number of the step, from 1, as in `metrics.jsonl`; the last one done if the event belongs to no step.
    """
    line = json.dumps(
        {"time": time.time(), "kind": kind, "step": step, "text": redact(text), **values}, allow_nan=False
    )
    with (out_dir / EVENTS_NAME).open("ab+") as file:
        # A killed process or a full disk may have left an incomplete line, which the new one must not continue.
        if file.tell():
            file.seek(-1, os.SEEK_END)
            line = line if file.read() == b"\n" else f"\n{line}"
        file.write(f"{line}\n".encode())


def try_append_event(out_dir: Path, kind: str, step: int, text: str, **values: Any) -> None:
    """Appends an event like `append_event`, or logs it if the file cannot be written."""
    try:
        append_event(out_dir, kind, step, text, **values)
    except OSError as error:
        LOGGER.warning("%s: %s; cannot be written to %s: %s", kind, text, EVENTS_NAME, error)


def read_events(out_dir: Path) -> list[dict[str, Any]]:
    """Returns all events, the oldest first. Incomplete lines and lines without kind or step are left out."""
    return [event for event in read_lines(out_dir / EVENTS_NAME) if isinstance(event.get("kind"), str)]
