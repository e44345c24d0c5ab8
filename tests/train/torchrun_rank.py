"""Runs a rank of torchrun that may fail: `torchrun -m tests.train.torchrun_rank FOLDER OVERRIDE...`.

FOLDER holds the case.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from launch import train
from launch.cli.entry import command
from tests.train.faults import arm


def main(arguments: Sequence[str]) -> int:
    """Arms the rank and trains as the command does."""
    folder, *overrides = arguments
    arm(Path(folder))
    return train.main(overrides)


if __name__ == "__main__":
    sys.exit(command("train", main, quiet=train.is_other_rank(os.environ)))  # type: ignore[attr-defined]
