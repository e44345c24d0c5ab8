"""Keeps which commands of a workflow are done, so that an interrupted workflow continues."""

import json
from pathlib import Path
from typing import Any

from launch.workflows.config import WorkflowCommand
from train.config.errors import ConfigError

STATE_NAME = "workflow.json"


class WorkflowProgress:
    """The commands of a workflow that are done, and the seconds of each, in a file."""

    def __init__(self, folder: Path) -> None:
        """Reads the file of a folder, which is created."""
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / STATE_NAME
        self._records: dict[str, dict[str, Any]] = {}
        if self._path.is_file():
            try:
                self._records = {str(key): dict(record) for key, record in json.loads(self._path.read_text()).items()}
            except (ValueError, TypeError, AttributeError) as error:
                raise ConfigError(
                    f"out_dir: {str(self._path)!r} must be the state of a workflow, cannot be read: {error}; "
                    "nearest valid: another folder"
                ) from error

    def is_done(self, line: WorkflowCommand) -> bool:
        """Returns whether a command is done."""
        record = self._records.get(line.name)
        if record is None or not record["is_done"]:
            return False
        if record["command"] != str(line):
            raise ConfigError(
                f"out_dir: {line.name} must be as in {str(self._path)!r}, was {record['command']!r}, is {str(line)!r}; "
                "nearest valid: another out_dir, or the same overrides"
            )
        return True

    def add(self, line: WorkflowCommand, seconds: float, *, is_done: bool) -> None:
        """Adds the seconds of a command that ended, and writes the file."""
        self._records[line.name] = {
            "command": str(line),
            "seconds": self.seconds(line) + seconds,
            "is_done": is_done,
        }
        partial = self._path.with_name(f"{STATE_NAME}.partial")
        partial.write_text(json.dumps(self._records, indent=2) + "\n", encoding="utf-8")
        partial.replace(self._path)

    def seconds(self, line: WorkflowCommand) -> float:
        """Returns the seconds of a command, those of interrupted attempts included."""
        return float(self._records.get(line.name, {"seconds": 0.0})["seconds"])
