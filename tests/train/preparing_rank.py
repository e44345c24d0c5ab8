"""A rank whose preparation of the corpus takes long: `torchrun -m tests.train.preparing_rank SECONDS FOLDER`.

The rank that prepares is killed during the preparation if FOLDER/victim names it.
"""

import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import train.corpus
from tests.tiny import tiny_config
from train.config import TrainConfig
from train.run import main


def slowed(seconds: float, folder: Path) -> None:
    """Has the corpus take so long; a rank named by `victim` ends amid that."""
    plain = train.corpus.prepare  # type: ignore[attr-defined]

    def prepare(*arguments: object) -> object:
        if not (folder / "prepared").exists():
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                time.sleep(0.2)
            (folder / "prepared").touch()
        return plain(*arguments)  # type: ignore[arg-type]

    train.corpus.prepare = prepare  # type: ignore[assignment, attr-defined]


def end_soon(after_seconds: float) -> None:
    """Kills this rank a while after it has joined."""
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, after_seconds)


def config_of(folder: Path) -> TrainConfig:
    config = tiny_config(folder)
    return replace(
        config,
        cluster=replace(config.cluster, timeout_seconds=5.0),
        parallelism=replace(config.parallelism, data=2, expert=2),
    )


if __name__ == "__main__":
    seconds, place = float(sys.argv[1]), Path(sys.argv[2])
    slowed(seconds, place)
    if (place / "victim").exists() and (place / "victim").read_text() == os.environ["RANK"]:
        end_soon(4.0)
    sys.exit(main(config_of(place)))
