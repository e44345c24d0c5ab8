"""Draws a schedule's timing as plain text: one row per rank, time to the right."""

import math
from collections import Counter

from dualpipe.draw.entry import (
    NAMES,
    needs_stage_label,
    number,
    pace_of,
    percent,
    plain,
    round_up,
    size,
    spread,
    steady_lines,
    tick_text,
)
from dualpipe.ir import Group, Op, Schedule
from dualpipe.registry import SCHEDULES
from dualpipe.simulate.bounds import lower_bound
from dualpipe.simulate.costs import CostModel, Costs, uniform
from dualpipe.simulate.timing import Simulation

_MAX_COLUMNS_PER_GROUP = 12
_TICK_COLUMNS = 12


def grid(schedule: Schedule, simulation: Simulation, width: int = 160) -> str:
    """Returns the picture with its legend. ASCII only, no trailing newline.

    A group is a label, followed by dashes up to its end: `F3`, or `F8+b0` for an overlapped pair. A picture wider than
    `width` columns is continued below.
    """
    scale = _scale(schedule, simulation)
    margin = len(_head(schedule.num_ranks - 1))
    rows = [_row(schedule, simulation, rank, scale) for rank in range(schedule.num_ranks)]
    total = max(map(len, rows))
    band = max(width - margin, _TICK_COLUMNS)
    lines: list[str] = []
    for start in range(0, max(total, 1), band):
        lines.append("time".ljust(margin) + _ruler(scale, start, min(start + band, total)))
        lines += [(_head(rank).rjust(margin) + row[start : start + band]).rstrip() for rank, row in enumerate(rows)]
        lines.append("")
    return "\n".join(lines + _legend(schedule))


def summary(
    schedule: Schedule, simulation: Simulation, costs: Costs | CostModel, memory_cap: float | None = None
) -> str:
    """Returns the numbers of a schedule that trains, one ASCII line for each, with the lower bound."""
    model = uniform(costs, schedule.num_ranks, schedule.num_stages) if isinstance(costs, Costs) else costs
    bound = lower_bound(schedule, model, memory_cap)
    above = simulation.makespan - bound.value
    share = f" ({percent(above / bound.value)})" if bound.value else ""
    lines = [
        ("schedule", f"{schedule.kind}, {size(schedule)}"),
        ("makespan", number(simulation.makespan)),
        ("idle per rank", spread(simulation.idle)),
        ("bubble", f"{percent(simulation.bubble_fraction)} of all ranks' time"),
        ("exposed exchange", f"{spread(simulation.exposed)} per rank"),
        ("peak activations", f"{spread(simulation.peaks)} of model/P"),
        *_offloaded(schedule, simulation),
        ("lower bound", f"{number(bound.value)}; this schedule is {number(above)}{share} above it"),
        ("bound's reason", bound.reason),
    ]
    steady = pace_of(schedule, model, simulation, memory_cap)
    if steady is not None:
        lines += list(zip(("steady state", "lost time"), steady_lines(steady), strict=True))
    # The cap includes the copies of the weights, the peaks of the simulation do not.
    own_cap = max(simulation.peaks, default=0.0) + schedule.num_directions * model.weights
    own = lower_bound(schedule, model, own_cap)
    if own.value > bound.value:
        lines.append(("bound at its peak", f"{number(own.value)}; {own.reason}"))
    idle = SCHEDULES.get(schedule.kind).idle if schedule.kind in SCHEDULES else None
    if idle is not None and isinstance(costs, Costs):
        formula = number(idle.value(schedule.num_ranks, costs))
        lines.append(("published idle", f"{idle.text} = {formula}, which assumes {idle.assumes}"))
    return plain("\n".join(f"{name.ljust(17)}  {value}" for name, value in lines))


def decode_summary(schedule: Schedule, simulation: Simulation) -> str:
    """Returns the numbers of a schedule that decodes, one per line. ASCII only."""
    assert schedule.cohorts is not None
    in_flight = schedule.cohorts * schedule.num_directions
    lines = [
        ("schedule", f"{schedule.kind}, {size(schedule)}"),
        ("cohorts in flight", f"{in_flight}, {schedule.num_micro_batches // in_flight} rounds of each"),
        ("makespan", number(simulation.makespan)),
        ("idle per rank", spread(simulation.idle)),
        ("bubble", f"{percent(simulation.bubble_fraction)} of all ranks' time"),
    ]
    return "\n".join(f"{name.ljust(17)}  {value}" for name, value in lines)


def _offloaded(schedule: Schedule, simulation: Simulation) -> list[tuple[str, str]]:
    kinds = Counter(op.kind for groups in schedule.ranks for group in groups for op in group)
    if not kinds[Op.OFFLOAD]:
        return []
    counts = f"{kinds[Op.OFFLOAD]} of {kinds[Op.FORWARD]} activations"
    return [("offloaded", f"{counts}, {spread(simulation.host_peaks)} of model/P in host memory")]


def _label(schedule: Schedule, rank: int, group: Group) -> str:
    parts = []
    for op in group:
        letter = op.kind.value.lower() if op.direction else op.kind.value
        stage = f"{op.stage}." if needs_stage_label(schedule, rank, op.direction) else ""
        parts.append(f"{letter}{stage}{op.micro_batch}")
    return "+".join(parts)


def _scale(schedule: Schedule, simulation: Simulation) -> float:
    """Returns columns per unit of time: room for all labels, with a limit for short groups."""
    needed = 0.0
    for rank, groups in enumerate(schedule.ranks):
        for group, start, end in zip(groups, simulation.starts[rank], simulation.ends[rank], strict=True):
            if end > start:
                needed = max(needed, (len(_label(schedule, rank, group)) + 1) / (end - start))
    most = _MAX_COLUMNS_PER_GROUP * max(map(len, schedule.ranks), default=0)
    return min(needed, most / simulation.makespan) if simulation.makespan else 0.0


def _row(schedule: Schedule, simulation: Simulation, rank: int, scale: float) -> str:
    row = ""
    for group, start, end in zip(schedule.ranks[rank], simulation.starts[rank], simulation.ends[rank], strict=True):
        first = round(start * scale)
        last = round(end * scale)
        row = row.ljust(first, ".") + _cell(_label(schedule, rank, group), last - first)
    return row.ljust(round(simulation.makespan * scale), ".")


def _cell(label: str, width: int) -> str:
    """Returns label, dashes and a gap. A label that does not fit is cut to its kind."""
    if width <= len(label):
        return label if width == len(label) else label[: min(width, 1)].ljust(width, "-")
    return label.ljust(width - 1, "-") + " "


def _ruler(scale: float, start: int, stop: int) -> str:
    """Returns times at round steps, each starting at its column."""
    if scale == 0:
        return "0"
    step = round_up(_TICK_COLUMNS / scale)
    ruler = ""
    for place in range(math.ceil(start / scale / step), math.floor(stop / scale / step) + 1):
        column = round(place * step * scale) - start
        text = tick_text(place * step)
        if 0 <= column <= stop - start - len(text):
            ruler = ruler.ljust(column) + text
    return ruler


def _legend(schedule: Schedule) -> list[str]:
    present = {op.kind for groups in schedule.ranks for group in groups for op in group}
    kinds = ", ".join(f"{kind.value} {name}" for kind, name in NAMES.items() if kind in present)
    lines = [f"{kinds}, with the micro-batch's number; dots: idle"]
    if schedule.num_directions > 1:
        lines.append("capitals: direction 0, enters at rank 0; small letters: direction 1, enters at the last rank")
    if schedule.cohorts is not None:
        lines.append(f"micro-batch m: round m / {schedule.cohorts} of cohort m % {schedule.cohorts} of its direction")
    if any(len(group) > 1 for groups in schedule.ranks for group in groups):
        lines.append("F+b: overlapped, computed under each other's exchange")
    return lines


def _head(rank: int) -> str:
    return f"rank {rank} |"
