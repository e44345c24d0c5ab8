"""Computes the contents of a picture of ranks' time: groups as cells and waits as strips."""

from dataclasses import dataclass
from itertools import groupby

from dualpipe.ir import Group, Schedule
from dualpipe.runtime.measured import LaneSpan, Measured
from dualpipe.simulate.simulate import Simulation


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """Time of a group on its rank. The operations of a group are drawn on top of each other."""

    rank: int
    start: float
    end: float
    members: Group


@dataclass(frozen=True, slots=True, kw_only=True)
class Strip:
    """Part of a cell in which the rank's main thread waits for a message or for an exchange."""

    rank: int
    start: float
    end: float
    message: bool


def planned_cells(schedule: Schedule, simulation: Simulation) -> list[Cell]:
    """Returns a cell for each group, in the unit of the costs; for copies only if the rank waits for them."""
    return [
        Cell(rank=rank, start=start, end=end, members=group)
        for rank, groups in enumerate(schedule.ranks)
        for group, start, end in zip(groups, simulation.starts[rank], simulation.ends[rank], strict=True)
        if end > start or not group[0].kind.is_copy
    ]


def measured_cells(schedule: Schedule, measured: Measured) -> tuple[list[Cell], list[Strip]]:
    """Returns a cell for each group that ran, and its waits, in seconds from the first rank's start.

    A cell begins when the group's first message has arrived. Time between cells is a wait or overhead.
    """
    cells: list[Cell] = []
    strips: list[Strip] = []
    origin = measured.start_seconds
    for rank, spans in enumerate(measured.ranks):
        main = sorted(
            (span for span in spans if span.lane != "comm"), key=lambda span: (span.group, span.start_seconds)
        )
        for index, parts in groupby(main, key=lambda span: span.group):
            cell, inner = _cell(rank, schedule.ranks[rank][index], list(parts), origin)
            cells.append(cell)
            strips += inner
    return cells, strips


def _cell(rank: int, members: Group, spans: list[LaneSpan], origin: float) -> tuple[Cell, list[Strip]]:
    working = [span for span in spans if span.lane != "wait"] or spans
    start, end = working[0].start_seconds, max(span.end_seconds for span in working)
    strips = [
        Strip(
            rank=rank,
            start=span.start_seconds - origin,
            end=span.end_seconds - origin,
            message=span.lane == "wait",
        )
        for span in spans
        if span.lane in ("wait", "exposed") and span.start_seconds >= start
    ]
    return Cell(rank=rank, start=start - origin, end=end - origin, members=members), strips
