"""A rank whose preparation of the corpus takes long: `torchrun -m tests.train.preparing_rank SECONDS FOLDER`.

Rank 1 is killed during the preparation if there is a file FOLDER/victim.
"""

import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import train.start.corpus
from tests.tiny import tiny_config
from train.config import TrainConfig
from train.run import main


def slowed(seconds: float, folder: Path) -> None:
    """Has the corpus take so long."""
    plain = train.start.corpus.prepare  # type: ignore[attr-defined]

    def prepare(*arguments: object) -> object:
        if not (folder / "prepared").exists():
            (folder / "preparing").touch()
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                time.sleep(0.2)
            (folder / "prepared").touch()
        return plain(*arguments)  # type: ignore[arg-type]

    train.start.corpus.prepare = prepare  # type: ignore[assignment, attr-defined]


def end_amid_preparation(folder: Path) -> None:
    """Kills this rank while another one prepares."""
    while not (folder / "preparing").exists():
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGKILL)


def config_of(folder: Path) -> TrainConfig:
    config = tiny_config(folder)
    return replace(
        config,
        cluster=replace(config.cluster, timeout_seconds=4.0),
        parallelism=replace(config.parallelism, data=2, expert=2),
    )


if __name__ == "__main__":
    seconds, place = float(sys.argv[1]), Path(sys.argv[2])
    slowed(seconds, place)
    if (place / "victim").exists() and os.environ["RANK"] == "1":
        threading.Thread(target=end_amid_preparation, args=(place,), daemon=True).start()
    sys.exit(main(config_of(place)))
