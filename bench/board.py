"""Scores schedules on a fixed grid: `python -m bench.board [--html PAGE] [FILE ...]`; `--write` renews docs/board.md.

A FILE is an entry: a schedule in the public JSON form (docs/schedules.md), or a plugin in Python that registers a kind
(docs/extend.md). It is proven and simulated in every line of the grid that it can run. Without a FILE, the grid and the
entries in bench/entries are scored. A plugin is code that runs as the user.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from base.registry import PluginError, load_plugins
from dualpipe.builder import build_schedule
from dualpipe.costs import Costs, uniform
from dualpipe.draw.entry import TimedSchedule, UnavailableSchedule, time_schedule
from dualpipe.draw.text import html
from dualpipe.ir import Schedule, ScheduleError, from_json
from dualpipe.registry import SCHEDULES
from dualpipe.simulation import simulate
from dualpipe.validate import validate

PAGE = Path(__file__).parents[1] / "docs" / "board.md"
ENTRIES = Path(__file__).with_name("entries")
_CHUNKS = (1, 2)
_COLUMNS = "P, M, F : I : W, exchange, latency, memory"
_HEAD = """# Board of schedules

Makespans of pipeline schedules on a fixed grid: P ranks, M micro-batches, the times F : I : W of a rank's share of the
model, the exchange of one F or I, the latency of a link, and the limit of live activations of model/P. Kinds with
chunks have 1 or 2, whichever is faster. A dash is a kind without an order of that size and limit.

`python -m bench.board FILE` proves and scores an entry of yours, or refuses it with the rule that it breaks. An entry
is a schedule in the [JSON form](schedules.md#how-it-works), or a [plugin](extend.md#a-pipeline-schedule) that registers
a kind, as `bench/entries/eager_1f1b.py` does. A plugin is a program that runs as you do. `--html PAGE` draws the first
entry next to all kinds. `make board` scores all files in `bench/entries`; it also runs for each pull request.
`python -m bench.board --write` renews this page.
"""


@dataclass(frozen=True, slots=True)
class Cell:
    """Line of the grid: a size with costs and a limit of live activations."""

    ranks: int
    micro_batches: int
    costs: Costs
    cap: int

    def __str__(self) -> str:
        costs = self.costs
        times = " : ".join(f"{time:g}" for time in (costs.forward, costs.backward_input, costs.backward_weight))
        return f"{self.ranks}, {self.micro_batches}, {times}, {costs.exchange:g}, {costs.latency:g}, {self.cap}"


_SIZES = ((4, 8), (4, 16), (8, 16))
_COSTS = (
    Costs(),
    Costs(exchange=1),
    Costs(exchange=0.5, latency=0.1),
    Costs(backward_input=1.5, backward_weight=0.5, exchange=0.5, latency=0.1),
)
GRID = tuple(
    Cell(ranks, micro_batches, costs, cap)
    for ranks, micro_batches in _SIZES
    for costs, cap in (*((costs, ranks + 2) for costs in _COSTS), (_COSTS[-1], ranks // 2 + 1))
)


def score(schedule: Schedule, cell: Cell) -> float:
    """Proves a schedule within the limit of a cell, and returns the makespan."""
    validate(schedule, cell.cap)
    return simulate(schedule, uniform(cell.costs, cell.ranks, schedule.num_stages)).makespan


def order_of(kind: str, cell: Cell) -> Schedule:
    """Returns a kind's order for a cell, proven. Raises ScheduleError if there is none within its limit."""
    spec = SCHEDULES.get(kind)
    times: dict[Schedule, float] = {}
    reason = ""
    for chunks in {min(max(chunks, spec.chunks[0]), spec.chunks[-1]) for chunks in _CHUNKS}:
        costs = uniform(cell.costs, cell.ranks, spec.num_stages(cell.ranks, chunks))
        cap = cell.cap if spec.takes_costs else None
        try:
            schedule = build_schedule(kind, cell.ranks, cell.micro_batches, costs, cap)
            times[schedule] = score(schedule, cell)
        except ScheduleError as error:
            reason = str(error)
    if not times:
        raise ScheduleError(reason)
    return min(times, key=times.__getitem__)


def read_entry(path: Path) -> dict[Cell, Schedule]:
    """Returns the orders of an entry by cell, proven; a plugin may lack some.

    Raises:
        ScheduleError: the entry breaks a rule; the message names it.
    """
    if path.suffix == ".py":
        return _read_plugin(path)
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ScheduleError(f"entry: must be a file of JSON or a .py file, {path} cannot be read: {error}") from error
    schedule = from_json(text)
    size = (schedule.num_ranks, schedule.num_micro_batches)
    if size not in _SIZES or schedule.cohorts is not None or schedule.slices > 1 or schedule.has_offload:
        rule = "must train whole sequences without offload, with ranks and micro-batches of the grid"
        raise ScheduleError(f"entry: {rule}, has {size}; nearest valid: {', '.join(map(str, _SIZES))}")
    validate(schedule, max(cell.cap for cell in GRID if (cell.ranks, cell.micro_batches) == size))
    return {cell: schedule for cell in GRID if (cell.ranks, cell.micro_batches) == size and _fits(schedule, cell)}


def _read_plugin(path: Path) -> dict[Cell, Schedule]:
    before = SCHEDULES.names()
    load_plugins([path])
    kinds = [kind for kind in SCHEDULES.names() if kind not in before]
    if len(kinds) != 1:
        raise ScheduleError(f"entry: must register one kind, {path} registers {', '.join(kinds) or 'none'}")
    orders: dict[Cell, Schedule] = {}
    reason = ""
    for cell in GRID:
        try:
            orders[cell] = order_of(kinds[0], cell)
        except ScheduleError as error:
            reason = reason or str(error)
    if not orders:
        raise ScheduleError(reason)
    return orders


def _fits(schedule: Schedule, cell: Cell) -> bool:
    try:
        score(schedule, cell)
    except ScheduleError:
        return False
    return True


def row_of(cell: Cell) -> str:
    """Returns a line of the page: makespans of all kinds, or a dash if a kind has no such order."""
    values = []
    for kind in SCHEDULES.names():
        try:
            values.append(f"{score(order_of(kind, cell), cell):.4g}")
        except ScheduleError:
            values.append("-")
    return f"| {cell} | {' | '.join(values)} |"


def page(cells: Sequence[Cell] = GRID) -> str:
    """Returns the page."""
    names = [f"`{kind}`" for kind in SCHEDULES.names()]
    rows = [f"| {_COLUMNS} | {' | '.join(names)} |"]
    rows += ["| --- " * (1 + len(names)) + "|"]
    return "\n".join([_HEAD, *rows, *map(row_of, cells)]) + "\n"


def pictures(orders: dict[Cell, Schedule]) -> str:
    """Returns an HTML page with pictures of the first order, if any, and of all kinds in the same cell."""
    cell = next(iter(orders), GRID[1])
    drawn: list[TimedSchedule | UnavailableSchedule] = []
    drawn += [time_schedule(orders[cell], cell.costs, cell.cap)] if orders else []
    for kind in SCHEDULES.names():
        try:
            drawn.append(time_schedule(order_of(kind, cell), cell.costs, cell.cap))
        except ScheduleError as error:
            drawn.append(UnavailableSchedule(kind=kind, reason=str(error)))
    return html(drawn, f"Board of schedules ({_COLUMNS}: {cell})")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.board", description="Scores schedules on a fixed grid.")
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="entry: .json or .py")
    parser.add_argument("--html", type=Path, metavar="PAGE", help="also draws the first entry next to all kinds")
    parser.add_argument("--write", action="store_true", help="renews docs/board.md")
    options = parser.parse_args(arguments)
    try:
        if options.write:
            PAGE.write_text(page(), "utf-8")
            return 0
        if not options.files:
            print(page(), end="")
        entries = {path: read_entry(path) for path in options.files or sorted(ENTRIES.glob("*.*"))}
        for path, orders in entries.items():
            print("\n".join([f"\n{path.name}\n", *(f"- {cell}: {score(orders[cell], cell):.4g}" for cell in orders)]))
        if options.html is not None:
            options.html.write_text(pictures(next(iter(entries.values()), {})), "utf-8")
    except (ScheduleError, PluginError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
