"""Shows a run's predicted time next to the measured one, from what the run itself has measured."""

import logging
from collections.abc import Sequence
from html import escape
from pathlib import Path

from train.config import TrainConfig
from train.planner.measured.compare import Comparison, compared_run
from train.planner.measured.record import MEASURED_NAME, PROBE_NAME
from train.planner.measured.shown import HEADER, notes, rows
from train.report.table import table

LOGGER = logging.getLogger("train")


def comparison_of(config: TrainConfig) -> Comparison | None:
    """Returns the comparison of a run with its plan; None if the run has not measured enough yet.

    Args:
        config: of the run; its `out_dir` is the folder.
    """
    folder = Path(config.out_dir)
    if not any((folder / name).is_file() for name in (PROBE_NAME, MEASURED_NAME)):
        return None
    try:
        return compared_run(config, folder)
    except (OSError, ValueError) as error:  # such as a step of a smaller batch, or a file that another run wrote
        LOGGER.info("no comparison of plan and run: %s", error)
        return None


def predicted_tables(comparisons: Sequence[tuple[str, Comparison | None]]) -> str:
    """Returns a table and notes for each run that has a comparison.

    Args:
        comparisons: of runs, by name.
    """
    parts = []
    for name, comparison in comparisons:
        if comparison is not None:
            heading = f"<h3>{escape(name)}</h3>" if len(comparisons) > 1 else ""
            about = f"Medians over {comparison.num_steps:,} steps, means over ranks."
            lines = "".join(f"<p>{escape(line)}</p>" for line in (about, *notes(comparison)))
            parts.append(heading + table(HEADER, list(rows(comparison))) + lines)
    return "".join(parts)
