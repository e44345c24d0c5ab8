"""What a series of runs under chaos showed, for people."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from tests.chaos.faults import KINDS
from tests.chaos.run import Outcome


def line_of(outcome: Outcome) -> str:
    """One run."""
    fault = outcome.fault
    where = f"{fault.name} (turn {fault.count}) of a {'new' if fault.begin == 'new' else 'resumed'} run"
    codes = " -> ".join(map(str, outcome.codes))
    restarts = ", restarts" if fault.restarts else ""
    went_on = "" if outcome.went_on_from is None else f", went on from step {outcome.went_on_from}"
    verdict = "right" if not outcome.problems else "; ".join(outcome.problems)
    return (
        f"{fault.index:>3}  {fault.kind:<11} {fault.whom:<7}  {where}; {fault.layout}{restarts}: "
        f"exit code {codes}, {outcome.seconds:.1f} s{went_on}: {verdict}"
    )


def print_table(outcomes: Sequence[Outcome], seconds: float) -> None:
    """By kind of fault."""
    table = Table("fault", "runs", "right", "exit codes of the life that was hit", "slowest end", "phases", box=None)
    for kind, hits_command in KINDS:
        mine = [each for each in outcomes if (each.fault.kind, each.fault.hits_command) == (kind, hits_command)]
        if not mine:
            continue
        codes = [each.codes[0] for each in mine]
        told = ", ".join(f"{code} x {codes.count(code)}" for code in sorted(set(codes)))
        # A run that starts again by itself shows one code, its last.
        right = sum(not each.problems for each in mine)
        phases = len({each.fault.name for each in mine})
        whom = "command" if hits_command else "rank"
        slowest = max(each.seconds for each in mine)
        table.add_row(f"{kind}, {whom}", str(len(mine)), str(right), told, f"{slowest:.1f} s", str(phases))
    Console(width=120).print(table)
    right = sum(not each.problems for each in outcomes)
    print(
        f"{right} of {len(outcomes)} runs ended in time with the documented exit code, and went on to the calm run's "
        f"weights, moments and average, to the bit, with every sample once; {seconds:.0f} s"
    )
