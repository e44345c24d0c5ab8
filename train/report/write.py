"""Writes `report.html` and `rollouts.html` into a run's folder, during the run and at its end."""

import logging
from collections.abc import Sequence
from pathlib import Path

from train.config import TrainConfig
from train.config.decode import encode, flatten
from train.files.rank_files import replace_text
from train.files.secrets import redact, redact_values
from train.report.page import REPORT_NAME, DrawnRun, html
from train.report.plan_comparison import Comparison, compared_run
from train.report.source import RunSource
from train.report.viewer import VIEWER_NAME, RolloutViewer
from train.schedule.measured import MEASURED_NAME, PROBE_NAME

COMPARISON_NAME = "comparison.html"
LOGGER = logging.getLogger("train")


class Report:
    """Follows a run's folder and draws it, with limited time and memory however long the run is."""

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._source = RunSource(Path(config.out_dir))
        self._viewer = RolloutViewer(self._source.folder, config.data.tokenizer)

    def write(self) -> Path:
        """Draws the folder's content, and returns the report, which links the page of answers if any.

        A new page replaces an earlier one when it is complete.
        """
        self._source.follow()
        run = _drawn(self._config, self._source, self._config.name)
        path = self._source.folder / REPORT_NAME
        replace_text(path, html([run], run.name))
        if self._viewer.has_rollouts:
            replace_text(self._source.folder / VIEWER_NAME, self._viewer.html(run.name, run.about))
        return path

    def try_to_write(self) -> None:
        """Writes the report during a run, which must continue: errors are only logged."""
        try:
            self.write()
        except Exception:
            LOGGER.exception("%s: cannot be drawn", self._source.folder / REPORT_NAME)


def compare(configs: Sequence[TrainConfig]) -> Path:
    """Draws several runs on one page, `comparison.html` in the folder of the first, and returns its path."""
    drawn = []
    for name, config in zip(_names(configs), configs, strict=True):
        source = RunSource(Path(config.out_dir))
        source.follow()
        drawn.append(_drawn(config, source, name))
    title = " and ".join(run.name for run in drawn)
    path = drawn[0].source.folder / COMPARISON_NAME
    replace_text(path, html(drawn, title, differing_settings(configs)))
    return path


def _drawn(config: TrainConfig, source: RunSource, name: str) -> DrawnRun:
    return DrawnRun(source=source, name=redact(name), about=redact(about(config)), comparison=comparison_of(config))


def comparison_of(config: TrainConfig) -> Comparison | None:
    """Returns the comparison of a run with its plan; None if the run has not measured enough yet."""
    folder = Path(config.out_dir)
    if not any((folder / name).is_file() for name in (PROBE_NAME, MEASURED_NAME)):
        return None
    try:
        return compared_run(config, folder)
    except (OSError, ValueError) as error:  # such as a step of a smaller batch, or a file that another run wrote
        LOGGER.info("no comparison of plan and run: %s", error)
        return None


def differing_settings(configs: Sequence[TrainConfig]) -> list[list[str]]:
    """Returns dotted keys, except names and folders, that differ, each with every run's value."""
    settings = [dict(flatten(redact_values(encode(config)))) for config in configs]
    keys = [key for key in dict.fromkeys(key for run in settings for key in run) if key not in ("name", "out_dir")]
    rows = [[key, *(str(run.get(key, "none")) for run in settings)] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def _names(configs: Sequence[TrainConfig]) -> list[str]:
    """Returns the names of the runs; equal ones get the folder's name, or else a number."""
    names = [config.name for config in configs]
    if len(set(names)) < len(names):
        names = [f"{config.name} {Path(config.out_dir).resolve().name}" for config in configs]
    if len(set(names)) < len(names):
        names = [f"{name} ({number})" for number, name in enumerate(names, 1)]
    return names


def about(config: TrainConfig) -> str:
    """A line on a run: its ranks, its batch, its folder."""
    mesh = config.parallelism
    batch = config.batch
    return (
        f"{mesh.world_size} ranks ({mesh.axes()}, experts over {mesh.expert}), "
        f"schedule {config.schedule.kind}, {config.precision.kind}, {batch.global_sequences} sequences of "
        f"{batch.sequence_length_tokens} tokens a step, {config.task.steps:,} steps asked for; folder {config.out_dir}"
    )
