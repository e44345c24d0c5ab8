"""Runs of which one rank gets signals at chosen operations, started as a command starts them.

`python -m tests.train.asked_run FOLDER CHAIN...` runs each chain in a folder of its own under FOLDER, which holds the
text to train on: life after life of one run that goes on by itself, each with the case whose turn it is. It writes
an `Ended` for each life into `FOLDER/CHAIN.json`.
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

from launch.command import command
from launch.config.run_config import check, compose_run
from launch.ranks.local import preload_modules, run_ranks, start_fork_server
from launch.ranks.run_folder import check_folder, write_run_folder
from tests.train.faults import choices
from tests.train.strikes import DRAWING, watch_drawing, watch_operations
from train.checkpoint.locate import CHECKPOINTS_NAME
from train.config import TrainConfig
from train.records.events import read_events
from train.records.status import read_status

NUM_STEPS = 7
RECORD = "the step's record"


@dataclass(frozen=True, slots=True)
class Ask:
    """A rank gets a signal as it comes to the `count`-th operation called `name` after one called `after`.

    Attributes:
        again: an operation at whose next turn it gets the signal twice more.
        lives: in how many lives of the ranks within one command.
        restarts: `cluster.max_restarts` of the command.
    """

    rank: int
    signal: str
    name: str
    count: int = 1
    after: str = ""
    again: str = ""
    lives: int = 1
    restarts: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """How a command ended, which steps then had checkpoints, and what had happened on the way."""

    exit_code: int
    status: dict[str, Any]
    checkpoints: list[int]
    events: list[str]


# Each life begins where the one before ended; the last one is left alone.
_ASKED_IN_EVERY_PHASE: list[Ask | None] = [
    Ask(0, "SIGTERM", "start of the job"),
    Ask(3, "SIGUSR1", "preparation of the corpus"),
    Ask(0, "SIGUSR1", "construction of the model"),
    Ask(3, "SIGTERM", "dispatch", 3),  # in step 1
    Ask(0, "SIGUSR1", "dispatch", after=RECORD),  # in the validation after step 2
    Ask(3, "SIGTERM", DRAWING),  # after step 3
    Ask(0, "SIGTERM", "checkpoint"),  # after step 4
    Ask(3, "SIGUSR1", "update of the weights", again="checkpoint"),  # in step 5, and as that is saved
    None,
]
CHAINS: dict[str, list[Ask | None]] = {
    "calm": [None],
    "calm_of_two": [None],
    "asked": _ASKED_IN_EVERY_PHASE,
    # In step 6, after the checkpoint of step 4; then in steps 1 and 2 of one that has no checkpoint yet.
    "killed": [Ask(2, "SIGKILL", "update of the weights", 6, restarts=2)],
    "killed_twice": [Ask(0, "SIGKILL", "combine backward", 12, lives=2, restarts=1)],
}  # fmt: skip


def asked(config: TrainConfig) -> int:
    """What each rank does."""
    from train.run import main as run

    arm(Path(config.out_dir))
    return run(config)


def arm(out_dir: Path) -> None:
    """To be called by every rank, first of all: the case's rank will get its signals."""
    values = json.loads((out_dir / "case.json").read_text())
    if values is None or os.environ["RANK"] != str(values["rank"]):
        return
    strikes = _Strikes(Ask(**values), out_dir)
    watch_operations(strikes.come)
    watch_drawing(strikes.come)


class _Strikes:
    """Signals of one rank to itself."""

    def __init__(self, ask: Ask, out_dir: Path) -> None:
        self._ask = ask
        self._num_seen, self._is_after, self._is_over = 0, not ask.after, False
        self._lives = out_dir / "lives"

    def come(self, name: str, label: Hashable | None) -> None:
        """The rank is about to do what is called so."""
        ask = self._ask
        self._is_after |= name == ask.after
        if self._is_over and name == ask.again:
            self._send()
            self._send()
        if self._is_over or not self._is_after or name != ask.name:
            return
        self._num_seen += 1
        if self._num_seen == ask.count:
            self._is_over = True
            lives = int(self._lives.read_text()) if self._lives.exists() else 0
            if lives < ask.lives:
                self._lives.write_text(str(lives + 1))
                self._send()

    def _send(self) -> None:
        os.kill(os.getpid(), signal.Signals[self._ask.signal])


def run_life(folder: Path, chain: str, ask: Ask | None) -> Ended:
    """One command, by what it leaves behind."""
    # Found by its full name, as ranks must find it: this module runs as __main__ here.
    from tests.train import asked_run

    out_dir = folder / chain
    restarts = f"cluster.max_restarts={0 if ask is None else ask.restarts}"
    config = compose_run([*run_choices(folder, chain), f"out_dir={out_dir}", restarts])
    check(config)
    check_folder(config)
    write_run_folder(config, datetime.now())
    (out_dir / "lives").unlink(missing_ok=True)
    (out_dir / "case.json").write_text(json.dumps(None if ask is None else asdict(ask)))
    code = run_ranks(out_dir, config.parallelism.world_size, asked_run.asked)
    status = read_status(out_dir)
    assert status is not None
    steps = sorted(
        int(path.name[5:]) for path in (out_dir / CHECKPOINTS_NAME).glob("step-*") if path.name[5:].isdigit()
    )
    events = [event["kind"] for event in read_events(out_dir)]
    return Ended(exit_code=code, status=asdict(status), checkpoints=steps, events=events)


def run_choices(folder: Path, chain: str = "calm") -> list[str]:
    """Of every life, but its folder; of four ranks, or of two where the chain says so."""
    ranks = ["parallelism=two_ranks"] if chain == "calm_of_two" else []
    return [
        *(*choices(folder), "resume=auto", f"task.steps={NUM_STEPS}", "validation.every_steps=2"),
        *("checkpointing.every_steps=4", "track.picture_every_steps=3", "cluster.timeout_seconds=60"),
        *ranks,
    ]


def main(arguments: Sequence[str]) -> int:
    """Runs the chains."""
    folder, *names = arguments
    config = compose_run([*run_choices(Path(folder)), f"out_dir={folder}/any"])
    start_fork_server(config.cluster, preload_modules(config.cluster))
    for chain in names:
        ended = [asdict(run_life(Path(folder), chain, ask)) for ask in CHAINS[chain]]
        (Path(folder) / f"{chain}.json").write_text(json.dumps(ended))
    return 0


if __name__ == "__main__":
    sys.exit(command("train", main))
