"""Puts deliberate faults into a copy of the sources, one at a time, and reports which test of `make test` finds each.

`python -m bench.faults [NUMBER ...]` runs all faults, or those with these numbers. For each it runs the
nearest tests, and if they pass all tests of the fault's package. `--list` checks that every fault still has its place
in the sources. The exit code is 1 if fewer than 38 of 40 are found.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests import ROOT

NEEDED_SHARE = 38 / 40


@dataclass(frozen=True, slots=True)
class Fault:
    """A change of a source that a test must find: `old` occurs once in the file. `tests`: the nearest ones."""

    path: str
    old: str
    new: str
    tests: str


FAULTS = tuple(Fault(**values) for values in yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8")))


def is_in_place(fault: Fault) -> bool:
    """Returns whether a fault's text occurs once in its file, and its tests exist."""
    path = ROOT / fault.path
    has_tests = all((ROOT / name).exists() for name in fault.tests.split())
    return path.is_file() and path.read_text("utf-8").count(fault.old) == 1 and has_tests


def copy_checkout(folder: Path) -> None:
    """Copies all tracked files."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / ".venv").symlink_to(ROOT / ".venv")


def find(fault: Fault, folder: Path) -> str:
    """Returns the first failing test, or an empty text if none of the package's tests fails."""
    path = folder / fault.path
    original = path.read_text("utf-8")
    path.write_text(original.replace(fault.old, fault.new), "utf-8")
    try:
        for tests in (fault.tests, f"tests/{fault.path.partition('/')[0]}"):
            command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests.split()]
            done = subprocess.run(
                [*command, "-m", "not long and not exhaustive"],
                cwd=folder,
                env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
            )
            lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
            if lines:
                return lines[0].partition(" - ")[0]
            # No test ran, or pytest was called in a wrong way: that finds nothing.
            if done.returncode:
                sys.exit(
                    f"{fault.path}: {tests} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-500:]}"
                )
    finally:
        path.write_text(original, "utf-8")
    return ""


def main() -> int:
    """Runs the faults and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", nargs="*", type=int, help="faults to run, from 0; all by default")
    parser.add_argument("--list", action="store_true", help="only check that every fault has its place")
    options = parser.parse_args()
    if any(number not in range(len(FAULTS)) for number in options.numbers):
        parser.error(f"numbers: must be from 0 to {len(FAULTS) - 1}, are {options.numbers}")
    misplaced = [number for number, fault in enumerate(FAULTS) if not is_in_place(fault)]
    for number in misplaced:
        fault = FAULTS[number]
        print(f"{number}: {fault.path} must have the text once, or {fault.tests} is gone: {fault.old}")
    if misplaced or options.list:
        return 2 if misplaced else 0
    numbers = options.numbers or range(len(FAULTS))
    num_found = 0
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        copy_checkout(Path(folder))
        for number in numbers:
            began = time.monotonic()
            test = find(FAULTS[number], Path(folder))
            num_found += bool(test)
            seconds = time.monotonic() - began
            print(f"{number:2} {FAULTS[number].path}: {test or 'NOT FOUND'} ({seconds:.0f} s)", flush=True)
    print(f"{num_found} of {len(numbers)} found")
    return int(num_found < NEEDED_SHARE * len(numbers))


if __name__ == "__main__":
    sys.exit(main())
