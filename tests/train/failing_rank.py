"""Ranks of which one raises amid a step, started as a user's command starts them.

`python -m tests.train.failing_rank WHERE RANK OVERRIDE...` trains with those overrides of `conf/train.yaml`; rank
RANK raises in its tenth WHERE, `forward` or `backward` of a phase, and leaves the file `raised` in the run's folder
at that moment.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.cli.entry import command
from launch.config.folder import write_run_folder
from launch.config.run import compose_run
from launch.ranks.local import preload_modules, run_ranks, start_fork_server
from train.config import TrainConfig

CAUSE = "the stage is out of order"


def forward(config: TrainConfig) -> int:
    return _train(config, "forward")


def backward(config: TrainConfig) -> int:
    return _train(config, "backward")


def _train(config: TrainConfig, where: str) -> int:
    from model.stage import StageRun
    from train.run import main as run

    if os.environ["RANK"] == config.name.rpartition("-")[2]:
        plain, calls = getattr(StageRun, where), [0]

        def raising(self: StageRun, phase: int) -> Any:
            calls[0] += 1
            if calls[0] == 10:
                (Path(config.out_dir) / "raised").touch()
                raise RuntimeError(CAUSE)
            return plain(self, phase)

        setattr(StageRun, where, raising)
    return run(config)


def main(arguments: Sequence[str]) -> int:
    # Found by its full name, as ranks must find it: this module runs as __main__ here.
    from datetime import datetime

    from tests.train import failing_rank

    where, rank, *overrides = arguments
    config = compose_run([*overrides, f"name=rank-{rank}"])
    start_fork_server(config.cluster, preload_modules(config.cluster))
    config = write_run_folder(config, datetime(2024, 1, 2))
    return run_ranks(Path(config.out_dir), config.parallelism.world_size, getattr(failing_rank, where))


if __name__ == "__main__":
    sys.exit(command("train", main))
