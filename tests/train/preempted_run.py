"""Starts runs like a command does, in which one rank receives signals at chosen operations.

`python -m tests.train.preempted_run FOLDER CHAIN...` runs each chain in a separate folder in FOLDER, which holds the
text to train on. A chain consists of attempts of one run with `resume=auto`, each with its own case. The command writes
an `Ended` for each attempt to `FOLDER/CHAIN.json`.
"""

import json
import os
import signal
import sys
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from launch.cli.entry import command
from launch.config.folder import check_folder, write_run_folder
from launch.config.run import check, compose_run
from launch.ranks.local import preload_modules, run_ranks, start_fork_server
from tests.train.faults import choices
from tests.train.operation_hooks import DRAWING, watch_drawing, watch_operations
from train.checkpoint.locate import CHECKPOINTS_NAME
from train.config import TrainConfig
from train.files.json_lines import read_events
from train.files.run_files import read_status

NUM_STEPS = 7
RECORD = "the step's record"


@dataclass(frozen=True, slots=True)
class SignalCase:
    """A signal that a rank receives before the `count`-th operation named `name` that follows one named `after`.

    Attributes:
        again: an operation; before the next one of this name, the rank receives the signal twice more.
        attempts: number of attempts, within one command, in which the rank receives the signal.
    """

    rank: int
    signal: str
    name: str
    count: int = 1
    after: str = ""
    again: str = ""
    attempts: int = 1
    restarts: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """The exit code and status of a command that ended, the steps of its checkpoints, and its events."""

    exit_code: int
    status: dict[str, Any]
    checkpoints: list[int]
    events: list[str]


# Each attempt continues where the previous one ended. The last one is not interrupted.
_PREEMPTED_IN_EVERY_PHASE: list[SignalCase | None] = [
    SignalCase(0, "SIGTERM", "start of the job"),
    SignalCase(1, "SIGUSR1", "preparation of the corpus"),
    SignalCase(1, "SIGTERM", "transfer", 3),  # in step 1
    SignalCase(0, "SIGUSR1", "transfer", after=RECORD),  # in the validation after step 2
    SignalCase(1, "SIGTERM", DRAWING),  # after step 3
    SignalCase(0, "SIGTERM", "checkpoint"),  # after step 4
    SignalCase(1, "SIGUSR1", "update of the weights", again="checkpoint"),  # in step 5, and while it is saved
    None,
]
CHAINS: dict[str, list[SignalCase | None]] = {
    "uninterrupted": [None],
    "preempted": _PREEMPTED_IN_EVERY_PHASE,
    # In step 6, after the checkpoint of step 4; then in step 1 of one that has no checkpoint yet.
    "killed": [SignalCase(1, "SIGKILL", "update of the weights", 6, restarts=2)],
    "killed_twice": [SignalCase(0, "SIGKILL", "transfer", 12, attempts=2, restarts=1)],
}  # fmt: skip


def run_rank(config: TrainConfig) -> int:
    """Runs one rank, which receives the signals if it is the case's."""
    from train.run import main as run

    arm(Path(config.out_dir))
    return run(config)


def arm(out_dir: Path) -> None:
    """Makes the case's rank send itself signals. Every rank calls it first."""
    values = json.loads((out_dir / "case.json").read_text())
    if values is None or os.environ["RANK"] != str(values["rank"]):
        return
    signals = _Signals(SignalCase(**values), out_dir)
    watch_operations(signals.on_operation)
    watch_drawing(signals.on_operation)


class _Signals:
    """The signals that a rank sends to itself."""

    def __init__(self, case: SignalCase, out_dir: Path) -> None:
        self._case = case
        self._num_seen, self._is_after, self._is_over = 0, not case.after, False
        self._attempts = out_dir / "attempts"

    def on_operation(self, name: str, label: Hashable | None) -> None:
        """Sends the signals if they are due before this operation."""
        case = self._case
        self._is_after |= name == case.after
        if self._is_over and name == case.again:
            self._send()
            self._send()
        if self._is_over or not self._is_after or name != case.name:
            return
        self._num_seen += 1
        if self._num_seen == case.count:
            self._is_over = True
            attempts = int(self._attempts.read_text()) if self._attempts.exists() else 0
            if attempts < case.attempts:
                self._attempts.write_text(str(attempts + 1))
                self._send()

    def _send(self) -> None:
        os.kill(os.getpid(), signal.Signals[self._case.signal])


def run_attempt(folder: Path, chain: str, case: SignalCase | None) -> Ended:
    # Ranks import this module by its full name, and here it runs as __main__.
    from tests.train import preempted_run

    out_dir = folder / chain
    restarts = f"cluster.max_restarts={0 if case is None else case.restarts}"
    config = compose_run([*run_choices(folder), f"out_dir={out_dir}", restarts])
    check(config)
    check_folder(config)
    write_run_folder(config, datetime.now())
    (out_dir / "attempts").unlink(missing_ok=True)
    (out_dir / "case.json").write_text(json.dumps(None if case is None else asdict(case)))
    code = run_ranks(out_dir, config.parallelism.world_size, preempted_run.run_rank)
    status = read_status(out_dir)
    assert status is not None
    steps = sorted(
        int(path.name[5:]) for path in (out_dir / CHECKPOINTS_NAME).glob("step-*") if path.name[5:].isdigit()
    )
    events = [event["kind"] for event in read_events(out_dir)]
    return Ended(exit_code=code, status=asdict(status), checkpoints=steps, events=events)


def run_choices(folder: Path) -> list[str]:
    """Returns the overrides of every attempt except its folder."""
    return [
        *(*choices(folder, "two_ranks"), "resume=auto", f"task.steps={NUM_STEPS}", "validation.every_steps=2"),
        *("checkpointing.every_steps=4", "track.picture_every_steps=3", "cluster.timeout_seconds=60"),
    ]


def main(arguments: Sequence[str]) -> int:
    folder, *names = arguments
    config = compose_run([*run_choices(Path(folder)), f"out_dir={folder}/any"])
    start_fork_server(config.cluster, preload_modules(config.cluster))
    for chain in names:
        ended = [asdict(run_attempt(Path(folder), chain, case)) for case in CHAINS[chain]]
        (Path(folder) / f"{chain}.json").write_text(json.dumps(ended))
    return 0


if __name__ == "__main__":
    sys.exit(command("train", main))
