"""`report.html` of a run's folder, written while the run goes on and after it."""

import logging
import os
from pathlib import Path

from train.config import TrainConfig
from train.records.secrets import redact
from train.report.page import REPORT_NAME, html
from train.report.source import RunSource

LOGGER = logging.getLogger("train")


class Report:
    """Follows a run's folder and draws it. What it keeps and how long it takes are limited however long the run is."""

    def __init__(self, config: TrainConfig) -> None:
        """`config`: of the run; its `out_dir` is the folder."""
        self._config = config
        self._source = RunSource(Path(config.out_dir))

    def write(self) -> Path:
        """Draws what the folder holds by now, in place of an earlier page, which stays until the new one is whole.

        Raises:
            OSError: something cannot be read or written.
        """
        self._source.follow()
        path = self._source.folder / REPORT_NAME
        # `launch.redraw` may draw beside the run itself.
        partial = path.with_name(f"{REPORT_NAME}.{os.getpid()}.partial")
        partial.write_text(html(self._source, redact(self._config.name), redact(about(self._config))), encoding="utf-8")
        partial.replace(path)
        return path

    def try_to_write(self) -> None:
        """`write` for a run that must go on: whatever goes wrong is told in the log alone."""
        try:
            self.write()
        except Exception:
            LOGGER.exception("%s: cannot be drawn", self._source.folder / REPORT_NAME)


def about(config: TrainConfig) -> str:
    """A line on a run: its ranks, its batch, its folder."""
    mesh, batch = config.parallelism, config.batch
    return (
        f"{mesh.world_size} ranks (pipeline {mesh.pipeline} x data {mesh.data}, experts over {mesh.expert}), "
        f"schedule {config.schedule.kind}, {config.precision.kind}, {batch.global_sequences} sequences of "
        f"{batch.sequence_length_tokens} tokens a step, {config.task.steps:,} steps asked for; folder {config.out_dir}"
    )
