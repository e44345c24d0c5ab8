"""Sends the lines, records and reports of a run to the terminal, files and wandb."""

import dataclasses
import logging
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from torch import distributed as dist

from train.balance import Balance, LoadLines
from train.config import TrainConfig
from train.errors import LOG_FOLDER
from train.files.json_lines import JsonLines
from train.files.rank_files import RankFiles
from train.files.secrets import redact
from train.records.display import Display, open_console
from train.records.metrics import Recorder, Wandb
from train.report.write import Report


class Reporter:
    """Prints and records on rank 0; does nothing on other ranks."""

    def __init__(
        self,
        display: Display | None,
        recorders: Sequence[Recorder],
        loads: LoadLines | None = None,
        report: Report | None = None,
    ) -> None:
        self._display = display
        self._recorders = recorders
        self._loads = loads
        self._report = report

    def say(self, line: str) -> None:
        """Prints a line for people, in several lines if it is long."""
        if self._display is not None:
            self._display.say(redact(line))

    def show(self, text: str) -> None:
        """Prints a text for people as it is."""
        if self._display is not None:
            self._display.show(redact(text))

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Names a phase next to the bar on a terminal, and prints its duration if that is at least a second."""
        return nullcontext() if self._display is None else self._display.phase(name)

    def record(self, values: dict[str, Any], balance: Balance) -> None:
        """Records one step's numbers."""
        if self._loads is not None:
            self._loads.record(values["step"], balance)
        for recorder in self._recorders:
            recorder.record(values)

    def last(self) -> dict[str, Any] | None:
        """Returns the record of the last step, possibly of an earlier attempt; None on other ranks than 0."""
        return next((each.last() for each in self._recorders if isinstance(each, JsonLines)), None)

    def amend(self, values: dict[str, Any]) -> None:
        """Replaces the record of the last step by one with further values."""
        for recorder in self._recorders:
            recorder.amend(values)

    def draw(self) -> None:
        """Writes the report of the run up to now."""
        if self._report is not None:
            self._report.try_to_write()

    def roll_back(self, step: int) -> None:
        """Removes the records of steps after this one, which will be repeated."""
        if self._loads is not None:
            self._loads.roll_back(step)
        for recorder in self._recorders:
            recorder.roll_back(step)

    def close(self) -> None:
        """Closes every recorder, and writes the last report."""
        if self._loads is not None:
            self._loads.close()
        for recorder in self._recorders:
            recorder.close()
        self.draw()


class _RankLog(logging.FileHandler):
    """The log file of a rank. Lines that a full disk refuses are lost without a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line without secrets."""
        return redact(super().format(record))

    def handleError(self, record: logging.LogRecord) -> None:
        """Ignores the error."""


def open_reporter(config: TrainConfig, first_step: int) -> Reporter:
    """Opens this rank's log and, on rank 0, all outputs of the run."""
    rank, out_dir = dist.get_rank(), Path(config.out_dir)
    files = RankFiles.of_run(config, rank)
    log = _RankLog(files.make_folder(out_dir / LOG_FOLDER) / f"{files.stem}.log")
    log.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(log)
    logging.getLogger("train").setLevel(logging.INFO)
    if rank != 0:
        return Reporter(None, [])
    display = Display(open_console(sys.stdout), config.task.steps, first_step, config.track.log_every_steps)
    recorders: list[Recorder] = [JsonLines(out_dir / "metrics.jsonl", first_step), display]
    if config.track.wandb != "disabled":
        recorders.append(Wandb(config.track, config.name, out_dir, dataclasses.asdict(config)))
    loads = LoadLines(out_dir, config.track.loads_every_steps, first_step)
    return Reporter(display, recorders, loads, Report(config))
