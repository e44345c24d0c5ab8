"""Prints the losses of runs side by side: `python -m bench.gpu.day.losses FOLDER [FOLDER]`."""

import argparse
import json
import sys
from pathlib import Path


def losses_of(folder: Path) -> list[float]:
    """Returns the loss of each step of a run."""
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def main() -> int:
    """Prints each run's losses and the largest relative difference from the first run's."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.day.losses", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--at-most", type=float, help="relative difference above which the exit code is 1")
    arguments = parser.parse_args()
    first, *others = found = [losses_of(folder) for folder in arguments.folders]
    for folder, losses in zip(arguments.folders, found, strict=True):
        print(folder.name, *(f"{loss:.6f}" for loss in losses))
    # A resumed run has the last steps alone.
    pairs = [(a, b) for losses in others for a, b in zip(reversed(first), reversed(losses), strict=False)]
    largest = max((abs(a - b) / abs(a) for a, b in pairs), default=0.0)
    print(f"largest relative difference {largest:.3e}")
    return 1 if arguments.at_most is not None and not largest <= arguments.at_most else 0


if __name__ == "__main__":
    sys.exit(main())
