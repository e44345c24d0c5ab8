"""Shows how runs are going: `python -m launch.status`.

It only reads their folders, so it works on any machine that sees them.
"""

if not __package__:
    import started_as_file  # type: ignore[import-not-found]  # noqa: F401

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.live import Live
from rich.text import Text

from base.decode import decode
from base.figures import aligned, plain
from base.refusal import ConfigError, broken
from comm.watchdog.ranks import name_ranks
from launch.cli.entry import command, preview_of
from launch.config.compose import compose, system_errors
from launch.config.folder import CONFIG_NAME, SCRIPT_NAME, with_listed_runs
from train.files.run_files import LOG_FOLDER, STATUS_NAME, Status, find_errors, find_rank_files, read_status
from train.files.run_lock import LEASE_SECONDS, LOCK_NAME, LockedError, read_lock
from train.records.display import open_console
from train.terminal import printable, seconds_text

OUTPUTS = "outputs"
_REFRESH_SECONDS = 2.0
_MOST_SECONDS = 10.0
_TAIL_BYTES = 4096
_STEP = re.compile(r" train: step (\d+): ")
_SQUEUE = ("squeue", "--me", "--noheader", "--format=%o|%i|%T|%R|%L")
"""Slurm's list of this user's jobs: script, number, state, nodes or reason for waiting, and time left."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StatusCommandConfig:
    """Configuration of the command; see `conf/status.yaml`."""

    run: tuple[str, ...]
    watch: bool
    format: Literal["text", "json"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RankHealth:
    """What a rank's log shows: the last step, and the age of its last line."""

    rank: int
    step: int | None
    silent_seconds: float
    problem: Literal["", "missing", "failed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunView:
    """The status of a run with the health of its ranks, its job in Slurm, and how old the status is.

    `is_gone`: the run has no verdict, but the process that owned its folder has ended or renews its lock no more.
    """

    folder: str
    status: Status
    age_seconds: float
    is_gone: bool
    ranks: tuple[RankHealth, ...]
    job: str | None

    @property
    def state(self) -> str:
        """The state in one word or a few."""
        return "ended without a verdict" if self.is_gone else self.status.state

    @property
    def is_over(self) -> bool:
        """Whether nothing will change until the run is started again."""
        return self.status.exit_code is not None or self.is_gone

    def lines(self) -> Iterator[str]:
        """Yields the lines of one run."""
        status = self.status
        rows = [["step", _steps(status) + _left(status)]]
        figures = [("", status.loss), ("validation ", status.validation_loss), ("reward ", status.reward)]
        if measured := ", ".join(f"{name}{value:.4g}" for name, value in figures if value is not None):
            rows.append(["loss", measured])
        if status.tokens_per_second is not None:
            rows.append(["speed", f"{plain(status.tokens_per_second)} tokens/s"])
        rows += [["checkpoint", status.checkpoint or "none"]]
        rows += [["ranks", line] for line in self._rank_lines()]
        if status.host:
            rows.append(["rank 0", f"on {status.host}, wrote {seconds_text(self.age_seconds)} ago"])
        if self.job is not None:
            rows.append(["job", self.job])
        if status.exit_code is not None:
            reason = f": {_one_line(status.reason)}" if status.reason else ""
            rows.append(["ended", f"exit code {status.exit_code}{reason}"])
        yield f"{self.folder}: {self.state}"
        yield from (f"  {line}" for line in aligned(rows, text=[0, 1]))

    def _rank_lines(self) -> Iterator[str]:
        """Yields a line for the ranks that are alike: the same problem and the same last step."""
        groups: dict[tuple[str, int | None], list[RankHealth]] = {}
        for rank in self.ranks:
            groups.setdefault((rank.problem, rank.step), []).append(rank)
        for (problem, step), ranks in sorted(groups.items(), key=lambda item: (not item[0][0], item[1][0].rank)):
            word = f"{problem}, " if problem else ""
            done = "before the first step" if step is None else f"after step {step:,}"
            silent = max(rank.silent_seconds for rank in ranks)
            age = "" if self.is_over else f", {seconds_text(silent)} since the last line of a log"
            yield f"{name_ranks([rank.rank for rank in ranks])}: {word}{done}{age}"

    def row(self) -> list[str]:
        """Returns the cells of this run in a table of several."""
        status = self.status
        loss = status.loss if status.reward is None else status.reward
        numbers = [loss, status.validation_loss, status.tokens_per_second]
        cells = ["none" if number is None else plain(number) for number in numbers]
        left = "" if status.seconds_left is None else seconds_text(status.seconds_left)
        sick = [rank.rank for rank in self.ranks if rank.problem]
        names = name_ranks(sick) if sick else ""
        return [self.folder, self.state, _steps(status), *cells, left, names, _one_line(status.reason)[:60]]

    def values(self) -> dict[str, Any]:
        """Returns everything as plain values."""
        ranks = [asdict(rank) for rank in self.ranks]
        own = {"folder": self.folder, "is_gone": self.is_gone, "age_seconds": self.age_seconds}
        return {**own, **asdict(self.status), "ranks": ranks, "job": self.job}


_HEADER = ["run", "state", "step", "loss", "validation", "tokens/s", "left", "ranks with a problem", "reason"]


def main(overrides: Sequence[str]) -> int:
    """Prints the status of one run, or a table of several; with `watch` until all have ended."""
    config = _decode(overrides)
    with system_errors():
        folders = _find_runs(config.run)
        if not config.watch:
            print(_text([_view(folder) for folder in folders], config.format), flush=True)
            return 0
        _watch(folders)
    return 0


def _decode(overrides: Sequence[str]) -> StatusCommandConfig:
    values = compose("status", with_listed_runs(overrides))
    runs = values["run"]
    config = decode(StatusCommandConfig, {**values, "run": runs if isinstance(runs, list) else [runs]})
    if config.watch and config.format == "json":
        raise broken("watch", "must be false with format=json", "true", "false")
    return config


def _find_runs(runs: Sequence[str]) -> list[Path]:
    """Returns the folders of runs: those that are named, all in a named folder, or the newest one."""
    if [*runs] in ([], [""]):
        found = _runs_in(Path(OUTPUTS))
        if not found:
            raise ConfigError(
                f"run: must be a run's folder, is empty, and {OUTPUTS} has no run; nearest valid: run=DIR"
            )
        return found[-1:]
    folders: list[Path] = []
    for run in runs:
        found = _runs_in(Path(run).expanduser())
        if not found:
            raise ConfigError(
                f"run: must be a run's folder or a folder of such folders, {run!r} holds no {CONFIG_NAME}"
            )
        folders += found
    return list(dict.fromkeys(folders))


def _runs_in(folder: Path) -> list[Path]:
    """Returns the folder if it is a run's, or else the runs up to two folders below, the oldest first."""
    if (folder / CONFIG_NAME).is_file():
        return [folder]
    configs = [*folder.glob(f"*/{CONFIG_NAME}"), *folder.glob(f"*/*/{CONFIG_NAME}")]
    return [config.parent for config in sorted(configs, key=lambda config: _changed(config.parent))]


def _changed(folder: Path) -> float:
    times = [path.stat().st_mtime for path in (folder / CONFIG_NAME, folder / STATUS_NAME) if path.exists()]
    return max(times, default=0.0)


def _view(folder: Path) -> RunView:
    now = time.time()
    status = read_status(folder)
    job = _job_of(folder)
    if status is None:
        status = Status(state="starting", time=_changed(folder))
    is_gone = status.exit_code is None and job is None and not _has_owner(folder, now)
    return RunView(
        folder=str(folder),
        status=status,
        age_seconds=max(now - status.time, 0.0),
        is_gone=is_gone,
        ranks=tuple(_ranks(folder, status, now)),
        job=job,
    )


def _has_owner(folder: Path, now: float) -> bool:
    """Returns whether a process holds the folder's lock, as far as this machine can see."""
    try:
        lock = read_lock(folder / LOCK_NAME)
    except LockedError:
        return False
    if lock is None or (lock.owner is not None and lock.owner.is_gone):
        return False
    return lock.is_alive_here or now - lock.renewed < LEASE_SECONDS


def _ranks(folder: Path, status: Status, now: float) -> Iterator[RankHealth]:
    """Yields the health of each rank that has a log."""
    failed = {_rank_of(path) for path in find_errors(folder)}
    for path in sorted(find_rank_files(folder / LOG_FOLDER, "rank_*.log"), key=lambda path: path.name):
        if path.name.endswith(".error.log"):
            continue
        with suppress(OSError):
            with path.open("rb") as file:
                file.seek(max(path.stat().st_size - _TAIL_BYTES, 0))
                steps = _STEP.findall(file.read().decode("utf-8", "replace"))
            rank = _rank_of(path)
            # Every rank that reports a missing one has an error log, and only others failed by themselves.
            is_missing = rank in status.missing_ranks
            has_failed = rank in failed and not status.missing_ranks
            yield RankHealth(
                rank=rank,
                step=int(steps[-1]) if steps else None,
                silent_seconds=max(now - path.stat().st_mtime, 0.0),
                problem="missing" if is_missing else "failed" if has_failed else "",
            )


def _rank_of(path: Path) -> int:
    return int(path.name.removeprefix("rank_").partition(".")[0])


def _job_of(folder: Path) -> str | None:
    """Returns number, state, nodes and time left of a folder's job in Slurm, if it has one."""
    script = folder.absolute() / SCRIPT_NAME
    squeue = shutil.which(_SQUEUE[0])
    if squeue is None or not script.is_file():
        return None
    try:
        command_line = [squeue, *_SQUEUE[1:]]
        listed = subprocess.run(command_line, capture_output=True, text=True, check=False, timeout=_MOST_SECONDS)
    except subprocess.TimeoutExpired:
        return f"unknown: squeue does not answer within {_MOST_SECONDS:g} s"
    for line in listed.stdout.splitlines():
        path, _, rest = line.partition("|")
        if path == str(script) and rest.count("|") == 3:
            number, state, place, left = rest.split("|")
            return f"{number} {state} {place}, {left} left"
    return None


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _steps(status: Status) -> str:
    total = "" if status.num_steps is None else f" of {status.num_steps:,}"
    return f"{status.step:,}{total}"


def _left(status: Status) -> str:
    return "" if status.seconds_left is None else f", {seconds_text(status.seconds_left)} left"


def _text(views: Sequence[RunView], form: Literal["text", "json"] = "text") -> str:
    """Returns the output: one run's lines, a table, or JSON (a list for several runs)."""
    if form == "json":
        values = [view.values() for view in views]
        return json.dumps(values[0] if len(values) == 1 else values, indent=2)
    if len(views) == 1:
        return "\n".join(views[0].lines())
    return "\n".join(line.rstrip() for line in aligned([_HEADER, *(view.row() for view in views)], text=[0, 1, 7, 8]))


def _watch(folders: Sequence[Path]) -> None:
    """Shows the runs until all have ended: on a terminal in place, elsewhere a text for each change."""
    console = open_console(sys.stdout)
    views = [_view(folder) for folder in folders]
    if console.is_terminal:
        with Live(Text(printable(_text(views))), console=console, auto_refresh=False) as live:
            while not all(view.is_over for view in views):
                time.sleep(_REFRESH_SECONDS)
                views = [_view(folder) for folder in folders]
                live.update(Text(printable(_text(views))), refresh=True)
        return
    shown: list[Status] = []
    while True:
        statuses = [replace(view.status, time=0.0) for view in views]
        if statuses != shown:
            print(_text(views), flush=True)
        if all(view.is_over for view in views):
            return
        shown = statuses
        time.sleep(_REFRESH_SECONDS)
        views = [_view(folder) for folder in folders]


preview = preview_of("status", _decode)

if __name__ == "__main__":
    sys.exit(command("status", main, preview))
