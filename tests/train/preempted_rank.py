"""Runs a rank of torchrun that receives signals: `torchrun -m tests.train.preempted_rank FOLDER OVERRIDE...`.

FOLDER holds the case.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from launch import train
from launch.cli.entry import command
from tests.train.preempted_run import arm


def main(arguments: Sequence[str]) -> int:
    """Arms the rank and trains as the command does."""
    folder, *overrides = arguments
    arm(Path(folder))
    return train.main(overrides)


if __name__ == "__main__":
    train.handle_signals()
    sys.exit(command("train", main, quiet=train.is_other_rank(os.environ)))  # type: ignore[attr-defined]
