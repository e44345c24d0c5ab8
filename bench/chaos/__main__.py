"""Prints the outcomes of runs with faults."""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.chaos.attempt import LAYOUTS
from bench.chaos.faults import KINDS, Begin, draw
from bench.chaos.run import Outcome
from launch.config.run import compose_run
from launch.ranks.local import preload_modules, start_fork_server
from tests.tiny import write_text
from tests.train.faults import choices


def line_of(outcome: Outcome) -> str:
    fault = outcome.fault
    where = f"{fault.name} (turn {fault.count}) of a {'new' if fault.begin == 'new' else 'resumed'} run"
    codes = " -> ".join(map(str, outcome.codes))
    restarts = ", restarts" if fault.restarts else ""
    resumed = "" if outcome.resumed_from is None else f", resumed from step {outcome.resumed_from}"
    verdict = "right" if not outcome.problems else "; ".join(outcome.problems)
    return (
        f"{fault.index:>3}  {fault.kind:<11} {fault.target:<7}  {where}; {fault.layout}{restarts}: "
        f"exit code {codes}, {outcome.seconds:.1f} s{resumed}: {verdict}"
    )


def print_table(outcomes: Sequence[Outcome], seconds: float) -> None:
    table = Table(
        "fault", "runs", "right", "exit codes of the attempt with the fault", "slowest end", "phases", box=None
    )
    for kind, hits_command in KINDS:
        mine = [each for each in outcomes if (each.fault.kind, each.fault.hits_command) == (kind, hits_command)]
        if not mine:
            continue
        codes = [each.codes[0] for each in mine]
        counts = ", ".join(f"{code} x {codes.count(code)}" for code in sorted(set(codes)))
        # A run that restarts its ranks has one exit code, its last.
        right = sum(not each.problems for each in mine)
        phases = len({each.fault.name for each in mine})
        target = "command" if hits_command else "rank"
        slowest = max(each.seconds for each in mine)
        table.add_row(f"{kind}, {target}", str(len(mine)), str(right), counts, f"{slowest:.1f} s", str(phases))
    Console(width=120).print(table)
    right = sum(not each.problems for each in outcomes)
    print(
        f"{right} of {len(outcomes)} runs ended in time with the documented exit code, and reached the uninterrupted "
        f"run's weights, moments and average bitwise, with every sample once; {seconds:.0f} s"
    )


_HAS_MOUNTS = "CHAOS_HAS_MOUNTS"


def can_mount() -> bool:
    """Returns whether this process or a child can mount private file systems."""
    try:
        return subprocess.run(["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]).returncode == 0
    except FileNotFoundError:
        return False


def main(arguments: Sequence[str]) -> int:
    """Draws faults, runs them and prints a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.chaos", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--faults", type=int, default=100, help="how many runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="+", help="run only the faults with these numbers")
    parser.add_argument("--layouts", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS))
    parser.add_argument("--keep", type=Path, help="an empty working folder; wrong runs stay there")
    given = parser.parse_args(arguments)
    if not os.environ.get(_HAS_MOUNTS) and can_mount():
        # The kernel removes the mounts of a killed process.
        again = [sys.executable, "-m", "bench.chaos", *arguments]
        os.execvpe("unshare", ["unshare", "--mount", *again], {**os.environ, _HAS_MOUNTS: "1"})
    with tempfile.TemporaryDirectory(prefix="chaos-") as scratch:
        folder = scratch if given.keep is None else given.keep
        Path(folder).mkdir(parents=True, exist_ok=True)
        return _run(Path(folder).resolve(), given)


def _run(folder: Path, given: argparse.Namespace) -> int:
    write_text(folder)
    config = compose_run([*choices(folder), f"out_dir={folder}/any"])
    start_fork_server(config.cluster, preload_modules(config.cluster))
    # Imported after the start of the fork server, because it imports torch.
    from bench.chaos.__main__ import line_of, print_table
    from bench.chaos.run import UninterruptedRun, run_fault, run_uninterrupted

    kinds = KINDS
    if not os.environ.get(_HAS_MOUNTS):
        print("full disks are skipped: they need root on a Linux that allows mounts")
        kinds = tuple(kind for kind in KINDS if kind[0] != "full disk")
    started = time.monotonic()
    uninterrupted: dict[tuple[str, Begin], UninterruptedRun] = {}
    for layout in given.layouts:
        uninterrupted |= {(layout, begin): run for begin, run in run_uninterrupted(folder, layout).items()}
        print(f"uninterrupted, and preempted after half of the steps: {layout}", flush=True)
    faults = draw({key: run.moments for key, run in uninterrupted.items()}, given.faults, given.seed, kinds)
    outcomes = []
    for fault in faults:
        if given.only is None or fault.index in given.only:
            outcomes.append(run_fault(folder, fault, uninterrupted[fault.layout, fault.begin]))
            print(line_of(outcomes[-1]), flush=True)
    print_table(outcomes, time.monotonic() - started)
    return 0 if outcomes and not any(outcome.problems for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
