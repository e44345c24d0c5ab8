"""Scores schedules on a fixed grid: `python -m bench.board [FILE]`; `--write` renews docs/board.md.

FILE is an entry in the public JSON form (docs/schedules.md). It is proven and simulated for every line of the grid that
has its size. Code is not accepted.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dualpipe.builder import build_schedule
from dualpipe.costs import Costs, uniform
from dualpipe.ir import Schedule, ScheduleError, from_json
from dualpipe.registry import SCHEDULES
from dualpipe.simulation import simulate
from dualpipe.validate import validate

PAGE = Path(__file__).parents[1] / "docs" / "board.md"
_CHUNKS = 2
_HEAD = """# Board of schedules

Makespans of pipeline schedules on a fixed grid of P ranks and M micro-batches with F = I = W = 1, with a limit of P + 2
live activations of model/P. Kinds with chunks have 2. A dash is a kind without an order of that size and limit.

`python -m bench.board FILE` proves and scores a schedule of yours in the [JSON form](schedules.md#how-it-works), or
refuses it with the rule that it breaks. Programs that generate schedules are not accepted.
`python -m bench.board --write` renews this page.
"""


@dataclass(frozen=True, slots=True)
class Cell:
    """Line of the grid: a size with costs."""

    ranks: int
    micro_batches: int
    costs: Costs

    def __str__(self) -> str:
        return f"{self.ranks}, {self.micro_batches}, {self.costs.exchange:g}, {self.costs.latency:g}"


_SIZES = ((4, 8), (4, 16), (8, 16))
_COSTS = (Costs(), Costs(exchange=1), Costs(exchange=0.5, latency=0.1))
GRID = tuple(Cell(*size, costs) for size in _SIZES for costs in _COSTS)


def score(schedule: Schedule, cell: Cell) -> float:
    """Proves a schedule within the limit of its size, and returns the makespan."""
    validate(schedule, cell.ranks + 2)
    return simulate(schedule, uniform(cell.costs, cell.ranks, schedule.num_stages)).makespan


def read_entry(path: Path) -> list[str]:
    """Returns a line for each cell of an entry's size.

    Raises:
        ScheduleError: the entry breaks a rule; the message names it.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ScheduleError(f"entry: must be a file of JSON, {path} cannot be read: {error}") from error
    schedule = from_json(text)
    size = (schedule.num_ranks, schedule.num_micro_batches)
    if size not in _SIZES or schedule.cohorts is not None or schedule.slices > 1 or schedule.has_offload:
        rule = "must train whole sequences without offload, with ranks and micro-batches of the grid"
        raise ScheduleError(f"entry: {rule}, has {size}; nearest valid: {', '.join(map(str, _SIZES))}")
    cells = [cell for cell in GRID if (cell.ranks, cell.micro_batches) == size]
    return [f"{cell}: {score(schedule, cell):.4g}" for cell in cells]


def row_of(cell: Cell) -> str:
    """Returns a line of the page: makespans of all kinds, or a dash if a kind has no such order."""
    values = []
    for kind, spec in SCHEDULES.items():
        chunks = min(max(_CHUNKS, spec.chunks[0]), spec.chunks[-1])
        costs = uniform(cell.costs, cell.ranks, spec.num_stages(cell.ranks, chunks))
        cap = cell.ranks + 2 if spec.takes_costs else None
        try:
            values.append(f"{score(build_schedule(kind, cell.ranks, cell.micro_batches, costs, cap), cell):.4g}")
        except ScheduleError:
            values.append("-")
    return f"| {cell} | {' | '.join(values)} |"


def page(cells: Sequence[Cell] = GRID) -> str:
    """Returns the page."""
    names = [f"`{kind}`" for kind in SCHEDULES.names()]
    rows = [f"| P, M, exchange, latency | {' | '.join(names)} |", "| --- " * (1 + len(names)) + "|"]
    return "\n".join([_HEAD, *rows, *map(row_of, cells)]) + "\n"


def main(arguments: Sequence[str]) -> int:
    if list(arguments) == ["--write"]:
        PAGE.write_text(page(), "utf-8")
        return 0
    try:
        print("\n".join(read_entry(Path(arguments[0]))) if arguments else page(), end="\n" if arguments else "")
    except ScheduleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
