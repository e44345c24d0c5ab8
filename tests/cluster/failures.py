"""Kills, stops or disconnects one rank in every phase of a step, and tabulates how runs end.

`python -m tests.cluster.failures [CASE...]` runs all cases by default and takes two to four minutes. Disconnecting
needs root. The exit code is 0 if every run ended in time, and at most one named a wrong rank or collective.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests import ROOT
from tests.cluster.namespaces import missing
from tests.tiny import write_text
from tests.train.faults import CASES, DEADLINE_SECONDS, GRACE_SECONDS, Case, Outcome, from_json

_TIMEOUT_SECONDS = 600.0


def run_cases(cases: Sequence[Case], folder: Path) -> Iterator[Outcome]:
    """Runs the cases of nodes and of one machine concurrently, because they mostly wait."""
    write_text(folder)
    cut = [case for case in cases if case.how == "disconnected"]
    others = [case for case in cases if case.how != "disconnected"]
    started = [
        (
            module,
            subprocess.Popen([sys.executable, "-m", module, str(folder), *map(str, chosen)], cwd=ROOT, stdout=log),
        )
        for module, chosen in (("tests.train.failing_run", others), ("tests.cluster.failing_nodes", cut))
        if chosen
        for log in [(folder / f"{module}.log").open("w")]
    ]
    for module, process in started:
        if process.wait(_TIMEOUT_SECONDS):
            raise RuntimeError(f"{module} ended with exit code {process.returncode}")
    for case in cases:
        yield from_json(json.loads((folder / f"{case}.json").read_text()))


def print_table(outcomes: Sequence[Outcome]) -> None:
    table = Table("rank", "fails at", "exit code", "seconds", "named", "message of the other ranks", box=None)
    for outcome in outcomes:
        case = outcome.case
        named = "rank, collective" if outcome.names_rank and outcome.names_operation else "not right"
        code = str(outcome.exit_code)
        table.add_row(f"{case.rank} {case.how}", case.phase, code, f"{outcome.seconds:.1f}", named, outcome.text)
    Console(width=160).print(table)


def main(names: Sequence[str]) -> int:
    """Runs the cases, prints the table and counts the right outcomes."""
    cases = [case for case in CASES if not names or str(case) in names]
    reason = missing()
    if reason is not None:
        print(f"disconnected ranks are skipped: {reason}")
        cases = [case for case in cases if case.how != "disconnected"]
    with tempfile.TemporaryDirectory(prefix="failures") as folder:
        outcomes = list(run_cases(cases, Path(folder)))
    print_table(outcomes)
    limit = DEADLINE_SECONDS + GRACE_SECONDS
    num_ended = sum(outcome.ended and outcome.seconds <= limit for outcome in outcomes)
    num_right = sum(outcome.is_right for outcome in outcomes)
    print(
        f"{num_ended} of {len(outcomes)} ended within {limit:g} s ({DEADLINE_SECONDS:g} s deadline); "
        f"{num_right} with the right exit code, rank and collective"
    )
    return 0 if num_ended == len(outcomes) and num_right >= len(outcomes) - 1 else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
