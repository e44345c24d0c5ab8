"""Formats the pass rates after each part of a workflow as a table."""

from collections.abc import Sequence
from pathlib import Path

from infer.scoring.pass_rates import PassRates
from launch.sampling.journal import JOURNAL_SUFFIX, read_samples
from launch.sampling.summary import measured_rates
from launch.workflows.config import WorkflowCommand, WorkflowCommandConfig, evaluation_file
from launch.workflows.progress import WorkflowProgress

_NUM_COLUMNS = 3
"""Of each evaluation: pass@1, maj@n and tokens."""


def workflow_table(config: WorkflowCommandConfig, lines: Sequence[WorkflowCommand], progress: WorkflowProgress) -> str:
    """Returns pass rates and mean numbers of tokens after each part, and the seconds of all commands."""
    rates = {
        (line.part, line.evaluation): _read_rates(evaluation_file(config, line.part, line.evaluation))
        for line in lines
        if line.evaluation is not None
    }
    names = [each.name for each in config.workflow.evaluations]
    num_samples = next((str(each.num_samples) for each in rates.values()), "n")
    columns = ("pass@1", f"maj@{num_samples}", "tokens")
    rows = [["part", *(f"{name} {column}" for name in names for column in columns), "seconds"]]
    for line in lines:
        if line.evaluation is None:
            cells = [cell for name in names for cell in _cells(rates.get((line.part, name)))]
            rows.append([line.part, *cells, f"{progress.seconds(line):.0f}"])
    empty = [""] * (_NUM_COLUMNS * len(names))
    evaluating = sum(progress.seconds(line) for line in lines if line.evaluation is not None)
    rows.append(["evaluations", *empty, f"{evaluating:.0f}"])
    rows.append(["total", *empty, f"{sum(map(progress.seconds, lines)):.0f}"])
    return _aligned(rows)


def _read_rates(path: str) -> PassRates:
    return measured_rates(read_samples(Path(path + JOURNAL_SUFFIX).expanduser()))


def _cells(rates: PassRates | None) -> list[str]:
    if rates is None:
        return [""] * _NUM_COLUMNS
    return [f"{rates.pass_at_1:.3f}", f"{rates.maj_at_n:.2f}", f"{rates.mean_tokens:.1f}"]


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Returns rows as lines: the first column is aligned to the left, the others to the right."""
    wide = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], wide[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(wide[0]), *cells]).rstrip())
    return "\n".join(lines)
