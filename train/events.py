"""`events.jsonl` of a run's folder: what happened beside its steps, one object a line. No torch here."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

EVENTS_NAME = "events.jsonl"


def append_event(out_dir: Path, event: str, values: Mapping[str, Any]) -> None:
    """Adds a line: the time in seconds since 1970, what happened, and its values, as JSON has them."""
    line = json.dumps({"time": time.time(), "event": event, **values}, allow_nan=False)
    with (out_dir / EVENTS_NAME).open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")


def read_events(out_dir: Path) -> list[dict[str, Any]]:
    """All lines, the oldest first; without what a process that was killed left half."""
    path, events = out_dir / EVENTS_NAME, []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events
