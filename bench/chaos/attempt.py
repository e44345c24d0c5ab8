"""Runs one command of a run with faults, and collects its results.

`python -m bench.chaos.attempt FOLDER NAME LAYOUT RESTARTS TIMEOUT` runs it in a separate process.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from datetime import datetime
from io import StringIO
from pathlib import Path

from bench.chaos.rank import notes_of, started_at
from launch.config.folder import check_folder, write_run_folder
from launch.config.run import check, compose_run
from launch.ranks.local import preload_modules, run_ranks, start_fork_server
from tests import ROOT
from tests.train.faults import choices
from train.config import TrainConfig

NUM_STEPS = 6
LONGEST_SECONDS = 150.0
"""Time after which a command counts as hanging."""

LAYOUTS: dict[str, list[str]] = {
    "DualPipe 2 x 2, experts over 2": ["parallelism=four_ranks"],
    "DualPipeV 2 x 1": ["parallelism=two_ranks", "schedule=dualpipe_v"],
    "1F1B 1 x 2, experts over 2 with copies": [
        *("parallelism.pipeline=1", "parallelism.data=2", "parallelism.expert=2", "schedule=1f1b"),
        "dispatch.balance=exact",
    ],
}

_GONE_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """Result of a command.

    Attributes:
        code: exit code; 128 + n if signal n ended it.
    """

    code: int
    output: str
    ended: float
    is_hung: bool
    surviving_ranks: list[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """Command that starts and resumes a run."""

    folder: Path
    name: str
    layout: str
    restarts: int = 0
    timeout_seconds: float = 60.0

    @property
    def out_dir(self) -> Path:
        return self.folder / self.name

    def overrides(self) -> list[str]:
        """Returns the overrides of `python -m launch.train`."""
        return [
            *(*choices(self.folder), f"out_dir={self.out_dir}", "resume=auto", f"task.steps={NUM_STEPS}"),
            *("checkpointing.every_steps=1", "validation.every_steps=2", "track.picture_every_steps=3"),
            *("ema.decay=0.9", f"cluster.max_restarts={self.restarts}", "cluster.grace_seconds=60"),
            *(f"cluster.timeout_seconds={self.timeout_seconds}", *LAYOUTS[self.layout]),
        ]

    def config(self) -> TrainConfig:
        """Checks the configuration and writes the run folder."""
        config = compose_run(self.overrides())
        check(config)
        check_folder(config)
        return write_run_folder(config, datetime.now())


def run_attempt(command: Command, *, in_separate_process: bool = False) -> Attempt:
    """Runs a command to its end.

    Args:
        in_separate_process: whether to run it in a separate process, which may be killed.
    """
    notes = notes_of(command.out_dir)
    before = set(notes.glob("pid-*"))
    with _Limit(notes, before) as limit:
        code, output = _run_in_separate_process(command, limit) if in_separate_process else _run_here(command)
    ended = time.time()
    new = sorted(set(notes.glob("pid-*")) - before)
    for path in sorted(notes.glob("output-*")):
        if path.with_name(path.name.replace("output", "pid")) in new:
            output += path.read_text(errors="replace")
    surviving_ranks = _surviving_ranks(new)
    return Attempt(code=code, output=output, ended=ended, is_hung=limit.is_over, surviving_ranks=surviving_ranks)


def _run_here(command: Command) -> tuple[int, str]:
    # Imported by its full name, because ranks must find it.
    from bench.chaos import rank

    with redirect_stderr(StringIO()) as output:
        config = command.config()
        code = run_ranks(command.out_dir, config.parallelism.world_size, rank.rank_of_chaos)
    return code, output.getvalue()


def _run_in_separate_process(command: Command, limit: "_Limit") -> tuple[int, str]:
    arguments = [str(command.folder), command.name, command.layout, str(command.restarts)]
    scratch = notes_of(command.out_dir) / "scratch"
    scratch.mkdir(exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.chaos.attempt", *arguments, str(command.timeout_seconds)],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(scratch)},  # a killed process leaves temporary files
        stderr=subprocess.PIPE,
        text=True,
    )
    limit.process = process
    # Returns after all ranks have ended, because they also hold the other end.
    _, output = process.communicate()
    return process.returncode if process.returncode >= 0 else 128 - process.returncode, output


class _Limit:
    """Timer that kills the ranks of a slow command, and the command if it is a separate process."""

    def __init__(self, notes: Path, before: set[Path]) -> None:
        self.is_over = False
        self.process: subprocess.Popen[str] | None = None
        self._notes = notes
        self._before = before
        self._timer = threading.Timer(LONGEST_SECONDS, self._end)

    def __enter__(self) -> "_Limit":
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def _end(self) -> None:
        self.is_over = True
        if self.process is not None:
            self.process.kill()
        for path in set(self._notes.glob("pid-*")) - self._before:
            if _is_alive(path):
                os.kill(int(path.read_text().split()[0]), signal.SIGKILL)


def _surviving_ranks(paths: Sequence[Path]) -> list[int]:
    """Returns the ranks that do not end soon."""
    until = time.monotonic() + _GONE_SECONDS
    while alive := [path for path in paths if _is_alive(path)]:
        if time.monotonic() > until:
            return [int(path.name.rpartition("-")[2]) for path in alive]
        time.sleep(0.05)
    return []


def _is_alive(path: Path) -> bool:
    """Returns whether the process in a rank's file is alive."""
    pid, started = path.read_text().split()
    return started_at(int(pid)) == started


def main(arguments: Sequence[str]) -> int:
    from bench.chaos.rank import rank_of_chaos

    folder, name, layout, restarts, timeout = arguments
    command = Command(
        folder=Path(folder), name=name, layout=layout, restarts=int(restarts), timeout_seconds=float(timeout)
    )
    config = command.config()
    start_fork_server(config.cluster, preload_modules(config.cluster))
    return run_ranks(command.out_dir, config.parallelism.world_size, rank_of_chaos)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
