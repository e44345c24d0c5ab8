"""Prints the outcomes of runs with faults."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from tests.chaos.faults import KINDS
from tests.chaos.run import Outcome


def line_of(outcome: Outcome) -> str:
    """Returns the line of one run."""
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
    """Prints a table by kind of fault."""
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
