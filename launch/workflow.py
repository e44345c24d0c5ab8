"""Runs commands in order and compares their results: `python -m launch.workflow`."""

if not __package__:
    import started_as_file  # type: ignore[import-not-found]  # noqa: F401

import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from base.decode import decode
from base.figures import aligned
from base.files import replace_text
from base.refusal import ConfigError, broken
from launch import signals_handled
from launch.cli.entry import command, preview_of
from launch.config.compose import compose, system_errors
from launch.grid import Grid, check_grid, write_grid
from launch.redraw import read_request
from launch.weights.scored_samples import JOURNAL_SUFFIX, measured_rates, read_samples
from score.ratings import PassRates

STATE_NAME = "workflow.json"
_NUM_COLUMNS = 3  # columns of each evaluation in the table: pass@1, maj@n and tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkflowPart:
    """A part of a workflow: a command, and whether the weights in the part's folder are evaluated.

    The command `grid` is all training runs of the workflow's grid, with the overrides of the part.
    """

    command: Literal["convert", "generate", "grid", "prepare", "redraw", "sample", "score_teacher", "train"]
    overrides: tuple[str, ...]
    evaluate: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Workflow:
    """The parts of a workflow by name, in order, and evaluations, which are overrides of `launch.sample`."""

    name: str
    grid: Grid | None
    evaluations: Mapping[str, tuple[str, ...]]
    parts: Mapping[str, WorkflowPart]


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkflowCommandConfig:
    """Configuration of the command. `conf/workflow.yaml` explains the keys."""

    workflow: Workflow
    out_dir: str
    train: tuple[str, ...]
    sample: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkflowCommand:
    """A command line of a part, or of its evaluation unless None. `arguments` follow `python -m`."""

    name: str
    part: str
    evaluation: str | None
    arguments: tuple[str, ...]

    def __str__(self) -> str:
        return f"python -m {shlex.join(self.arguments)}"


class WorkflowProgress:
    """The commands of a workflow that are done, and the seconds of each, in a file."""

    def __init__(self, folder: Path) -> None:
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
            rule = f"{line.name} must be as in {str(self._path)!r}, was {record['command']!r}"
            raise broken("out_dir", rule, repr(str(line)), "another out_dir, or the same overrides")
        return True

    def add(self, line: WorkflowCommand, seconds: float, *, is_done: bool) -> None:
        """Adds the seconds of a command that ended, and writes the file."""
        self._records[line.name] = {
            "command": str(line),
            "seconds": self.seconds(line) + seconds,
            "is_done": is_done,
        }
        replace_text(self._path, json.dumps(self._records, indent=2) + "\n")

    def seconds(self, line: WorkflowCommand) -> float:
        """Returns the seconds of a command, those of interrupted attempts included."""
        return float(self._records.get(line.name, {"seconds": 0.0})["seconds"])


def main(overrides: Sequence[str]) -> int:
    """Runs the commands of a workflow that are not done, and prints a table of all parts."""
    config = read_workflow(overrides)
    with system_errors():
        lines = workflow_commands(config)
        progress = WorkflowProgress(Path(config.out_dir).expanduser())
        left = [line for line in lines if not progress.is_done(line)]
        for line in left:
            print(
                f"\n{config.workflow.name}, {lines.index(line) + 1} of {len(lines)}, {line.name}:\n{line}", flush=True
            )
            if code := _run(line, progress):
                print(f"{line.name} ended with exit code {code}; the same command continues there", file=sys.stderr)
                return code
        print("\n" + workflow_table(config, lines, progress), flush=True)
        grid = config.workflow.grid
        if grid is not None and (grid.tables or grid.maps):
            print("\n" + write_grid(grid, config.workflow.name, Path(config.out_dir).expanduser()))
    return 0


def _run(line: WorkflowCommand, progress: WorkflowProgress) -> int:
    """Runs a command and returns its exit code. Its seconds are kept if this process is interrupted."""
    began = time.monotonic()
    code = -1
    process = subprocess.Popen([sys.executable, "-m", *line.arguments])
    try:
        # The command must not outlive this process.
        with signals_handled({signal.SIGTERM: lambda number, frame: process.send_signal(number)}):
            code = process.wait()
    except KeyboardInterrupt:
        # A terminal sends Ctrl-C to both processes. The command saves what it has.
        code = process.wait()
        raise
    finally:
        progress.add(line, time.monotonic() - began, is_done=code == 0)
    return code if code >= 0 else 128 - code


def read_workflow(overrides: Sequence[str]) -> WorkflowCommandConfig:
    """Composes and decodes the configuration of the command."""
    config = decode(WorkflowCommandConfig, compose("workflow", overrides))
    grid = config.workflow.grid
    if (grid is not None) != any(part.command == "grid" for part in config.workflow.parts.values()):
        rule = "must be there if and only if a part has the command grid"
        raise broken("workflow.grid", rule, "null" if grid is None else "there", "workflow=ablations")
    if grid is not None:
        check_grid(grid)
    for part in config.workflow.parts.values():
        if part.command == "redraw":  # refused now, not after the runs that it draws
            read_request(part.overrides)
    return config


def workflow_commands(config: WorkflowCommandConfig) -> list[WorkflowCommand]:
    """Returns the commands of all parts and evaluations, in order."""
    commands = []
    further = {"train": config.train, "sample": config.sample}
    for name, part in _single_parts(config):
        arguments = (f"launch.{part.command}", *part.overrides, *further.get(part.command, ()))
        commands.append(WorkflowCommand(name=name, part=name, evaluation=None, arguments=arguments))
        for evaluation, overrides in config.workflow.evaluations.items() if part.evaluate else ():
            files = (f"ckpt={config.out_dir}/{name}", f"out={evaluation_file(config, name, evaluation)}")
            arguments = ("launch.sample", *files, *overrides, *config.sample)
            command_name = f"{name}/{evaluation}"
            commands.append(WorkflowCommand(name=command_name, part=name, evaluation=evaluation, arguments=arguments))
    return commands


def _single_parts(config: WorkflowCommandConfig) -> Iterator[tuple[str, WorkflowPart]]:
    """Yields the parts by name, with a part for each run of a grid."""
    for name, part in config.workflow.parts.items():
        if part.command == "grid" and config.workflow.grid is not None:
            for run, overrides in config.workflow.grid.runs(config.out_dir):
                yield run, replace(part, command="train", overrides=(*part.overrides, *overrides))
        else:
            yield name, part


def evaluation_file(config: WorkflowCommandConfig, part: str, evaluation: str) -> str:
    """Returns the file of the right answers of an evaluation; all answers are in its journal."""
    return f"{config.out_dir}/evaluations/{part}_{evaluation}.jsonl"


def workflow_table(config: WorkflowCommandConfig, lines: Sequence[WorkflowCommand], progress: WorkflowProgress) -> str:
    """Returns pass rates and numbers of tokens after each part, and the seconds of all commands."""
    rates = dict[tuple[str, str], PassRates]()
    for line in lines:
        if line.evaluation is not None:
            journal = Path(evaluation_file(config, line.part, line.evaluation) + JOURNAL_SUFFIX).expanduser()
            rates[line.part, line.evaluation] = measured_rates(read_samples(journal))
    names = list(config.workflow.evaluations)
    num_samples = next((str(rate.num_samples) for rate in rates.values()), "n")
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
    return "\n".join(aligned(rows, text=[0]))


def _cells(rates: PassRates | None) -> list[str]:
    if rates is None:
        return [""] * _NUM_COLUMNS
    return [f"{rates.pass_at_1:.3f}", f"{rates.maj_at_n:.2f}", f"{rates.mean_tokens:.1f}"]


preview = preview_of("workflow", read_workflow)

if __name__ == "__main__":
    sys.exit(command("workflow", main, preview))
