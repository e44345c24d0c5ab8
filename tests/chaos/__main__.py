"""Runs that are killed, stopped, asked, starved of disk and robbed of checkpoints, and must end as if nothing had been.

`python -m tests.chaos [--faults 100] [--seed 0] [--only INDEX...] [--keep FOLDER]` prints a line for each run and a
table; the exit code is 0 if every run was right. Full disks need root on Linux; without, they are left out, which is
said.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from launch.config.run_config import compose_run
from launch.ranks.local import preload_modules, start_fork_server
from tests.chaos.faults import KINDS, Begin, draw
from tests.chaos.life import LAYOUTS
from tests.tiny import write_text
from tests.train.faults import choices

_APART = "CHAOS_MOUNTS_APART"


def can_mount() -> bool:
    """Whether this process, or one that it starts, may have file systems of its own."""
    try:
        return subprocess.run(["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]).returncode == 0
    except FileNotFoundError:
        return False


def main(arguments: Sequence[str]) -> int:
    """Draws, runs, prints."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--faults", type=int, default=100, help="how many runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="+", help="of these, the ones with these numbers")
    parser.add_argument("--layouts", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS))
    parser.add_argument("--keep", type=Path, help="an empty folder to work in; runs that were not right stay there")
    given = parser.parse_args(arguments)
    if not os.environ.get(_APART) and can_mount():
        # Mounts of a process that is killed go with it.
        again = [sys.executable, "-m", "tests.chaos", *arguments]
        os.execvpe("unshare", ["unshare", "--mount", *again], {**os.environ, _APART: "1"})
    with tempfile.TemporaryDirectory(prefix="chaos-") as scratch:
        folder = scratch if given.keep is None else given.keep
        Path(folder).mkdir(parents=True, exist_ok=True)
        return _run(Path(folder).resolve(), given)


def _run(folder: Path, given: argparse.Namespace) -> int:
    write_text(folder)
    config = compose_run([*choices(folder), f"out_dir={folder}/any"])
    start_fork_server(config.cluster, preload_modules(config.cluster))
    # Behind the fork server: it imports torch as well.
    from tests.chaos.run import Calm, calm_runs, run_fault
    from tests.chaos.table import line_of, print_table

    kinds = KINDS
    if not os.environ.get(_APART):
        print("full disks are left out: they need root and a Linux that lets it mount")
        kinds = tuple(kind for kind in KINDS if kind[0] != "full disk")
    started = time.monotonic()
    calm: dict[tuple[str, Begin], Calm] = {}
    for layout in given.layouts:
        calm |= {(layout, begin): run for begin, run in calm_runs(folder, layout).items()}
        print(f"left alone, and asked to make room after half of it: {layout}", flush=True)
    faults = draw({key: run.moments for key, run in calm.items()}, given.faults, given.seed, kinds)
    outcomes = []
    for fault in faults:
        if given.only is None or fault.index in given.only:
            outcomes.append(run_fault(folder, fault, calm[fault.layout, fault.begin]))
            print(line_of(outcomes[-1]), flush=True)
    print_table(outcomes, time.monotonic() - started)
    return 0 if outcomes and not any(outcome.problems for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
