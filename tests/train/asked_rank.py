"""A rank of torchrun that gets signals: `torchrun -m tests.train.asked_rank FOLDER OVERRIDE...`, the case in FOLDER."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from launch import train
from launch.command import command
from tests.train.asked_run import arm


def main(arguments: Sequence[str]) -> int:
    """Arms the rank and trains as the command does."""
    folder, *overrides = arguments
    arm(Path(folder))
    return train.main(overrides)


if __name__ == "__main__":
    train.handle_signals()
    sys.exit(command("train", main, quiet=train.is_other_rank(os.environ)))
