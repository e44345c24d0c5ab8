"""Sends the lines, records and reports of a run to the terminal, files and wandb."""

import dataclasses
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

from torch import distributed as dist

from train.balance import Balance, LoadLines
from train.config import TrackConfig, TrainConfig
from train.errors import LOG_FOLDER
from train.files.json_lines import METRICS_NAME, JsonLines
from train.files.status import RankFiles, redact, redact_values
from train.records.display import Display, open_console
from train.report.page import Report

LOGGER = logging.getLogger("train")
Record = Mapping[str, Any]


class Recorder(Protocol):
    """The protocol of an output for the metrics of steps."""

    def record(self, values: Record) -> None:
        """Records the metrics of one step, including the key `step`."""
        ...

    def roll_back(self, step: int) -> None:
        """Removes the records of steps after this one, which will be repeated."""
        ...

    def amend(self, values: Record) -> None:
        """Replaces the record of the last step by one with further values."""
        ...

    def close(self) -> None:
        """Writes pending records and closes the output."""
        ...


class Wandb:
    """A wandb run, offline unless configured otherwise, with its files in the run's folder."""

    def __init__(self, config: TrackConfig, name: str, out_dir: Path, resolved: Record) -> None:
        import wandb

        # wandb records the command line from sys.argv, so secrets are hidden there.
        sys.argv[1:] = [redact(argument) for argument in sys.argv[1:]]
        self._run = wandb.init(
            project=config.project,
            name=redact(name),
            dir=out_dir,
            mode="online" if config.wandb == "online" else "offline",
            settings=wandb.Settings(silent=True, disable_git=True),
        )
        self._run.config.update(redact_values(resolved))
        self._last_step = 0
        self._has_failed = False

    def record(self, values: Record) -> None:
        """Logs a step, unless wandb already has it, because wandb cannot replace it."""
        if values["step"] > self._last_step:
            self._last_step = values["step"]
            self._log(values)

    def roll_back(self, step: int) -> None:
        """Does nothing, because a wandb run cannot remove steps."""

    def amend(self, values: Record) -> None:
        """Logs the record again with further values, also in a wandb run that was started after the step."""
        self._last_step = max(self._last_step, values["step"])
        self._log(values)

    def close(self) -> None:
        """Ends the run."""
        self._try(self._run.finish)

    def _log(self, values: Record) -> None:
        self._try(lambda: self._run.log(dict(values), step=values["step"]))

    def _try(self, act: Callable[[], Any]) -> None:
        """Calls wandb. An error of wandb is logged once and does not end the run."""
        try:
            act()
        except Exception as error:
            if not self._has_failed:
                LOGGER.warning("wandb: %s: %s", type(error).__name__, error)
            self._has_failed = True


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
        return redact(super().format(record))

    def handleError(self, record: logging.LogRecord) -> None:
        """Ignores the error."""


def open_reporter(config: TrainConfig, first_step: int) -> Reporter:
    """Opens this rank's log and, on rank 0, all outputs of the run."""
    rank = dist.get_rank()
    out_dir = Path(config.out_dir)
    files = RankFiles.of_run(config, rank)
    log = _RankLog(files.make_folder(out_dir / LOG_FOLDER) / f"{files.stem}.log")
    log.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(log)
    logging.getLogger("train").setLevel(logging.INFO)
    if rank != 0:
        return Reporter(None, [])
    display = Display(open_console(sys.stdout), config.task.steps, first_step, config.track.log_every_steps)
    recorders: list[Recorder] = [JsonLines(out_dir / METRICS_NAME, first_step), display]
    if config.track.wandb != "disabled":
        recorders.append(Wandb(config.track, config.name, out_dir, dataclasses.asdict(config)))
    loads = LoadLines(out_dir, config.track.loads_every_steps, first_step)
    return Reporter(display, recorders, loads, Report(config))
