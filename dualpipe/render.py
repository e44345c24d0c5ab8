"""A schedule's timing as plain text: one row per rank, time to the right."""

import math

from dualpipe.costs import Costs
from dualpipe.ir import Group, Op, Schedule
from dualpipe.simulate import Simulation, published_idle

_NAMES = {
    Op.FORWARD: "forward",
    Op.BACKWARD: "backward",
    Op.BACKWARD_INPUT: "backward for inputs",
    Op.BACKWARD_WEIGHT: "backward for weights",
}
_MAX_COLUMNS_PER_GROUP = 12
_TICK_COLUMNS = 12


def grid(schedule: Schedule, simulation: Simulation, width: int = 160) -> str:
    """The picture with its legend, ASCII only, no trailing newline.

    A group is a label and dashes up to its end: `F3`, or `F8+b0` for an overlapped pair. Direction 1 is in small
    letters, idle time is dots. Columns are as narrow as the labels allow; a picture wider than `width` columns goes
    on below, from the time at which it was cut.
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


def summary(schedule: Schedule, simulation: Simulation, costs: Costs) -> str:
    """The numbers beside the picture, a line each: makespan, idle time, bubble, peak memory, published formula."""
    lines = [
        ("schedule", f"{schedule.kind}, {schedule.num_ranks} ranks, {schedule.num_micro_batches} micro-batches"),
        ("makespan", _number(simulation.makespan)),
        ("idle per rank", _range(simulation.idle)),
        ("bubble", f"{100 * simulation.bubble_fraction:.2f} % of all ranks' time"),
        ("peak activations", f"{_range(simulation.peaks)} (of one stage and micro-batch)"),
    ]
    if schedule.kind == "dualpipe":
        formula = _number(published_idle(schedule.num_ranks, costs))
        lines.append(("published idle", f"(P/2-1)(F&B+B-3W) = {formula}, which assumes F = I >= W and no latency"))
    return "\n".join(f"{name.ljust(16)}  {value}" for name, value in lines)


def _label(schedule: Schedule, rank: int, group: Group) -> str:
    """Kind and micro-batch of each member; the stage too where the direction alone does not tell it."""
    held = [direction for direction, _ in schedule.stages_of(rank)]
    parts = []
    for op in group:
        letter = op.kind.value.lower() if op.direction else op.kind.value
        stage = f"{op.stage}." if held.count(op.direction) > 1 else ""
        parts.append(f"{letter}{stage}{op.micro_batch}")
    return "+".join(parts)


def _scale(schedule: Schedule, simulation: Simulation) -> float:
    """Columns per unit of time: room for every label and a gap, unless very short groups would stretch the rest."""
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
        first, last = round(start * scale), round(end * scale)
        row = row.ljust(first, ".") + _cell(_label(schedule, rank, group), last - first)
    return row.ljust(round(simulation.makespan * scale), ".")


def _cell(label: str, width: int) -> str:
    """The label, dashes and a gap. A label that does not fit shrinks to its kind: half a number would mislead."""
    if width <= len(label):
        return label if width == len(label) else label[: min(width, 1)].ljust(width, "-")
    return label.ljust(width - 1, "-") + " "


def _ruler(scale: float, start: int, stop: int) -> str:
    """Times at round steps, each beginning at its column."""
    if scale == 0:
        return "0"
    step = _round_up(_TICK_COLUMNS / scale)
    ruler = ""
    for tick in range(math.ceil(start / scale / step), math.floor(stop / scale / step) + 1):
        column = round(tick * step * scale) - start
        text = _number(tick * step)
        if 0 <= column <= stop - start - len(text):
            ruler = ruler.ljust(column) + text
    return ruler


def _round_up(value: float) -> float:
    """The least of 1, 2, 5 times a power of ten that is not below the value."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= value * (1 - 1e-9))


def _legend(schedule: Schedule) -> list[str]:
    present = {op.kind for groups in schedule.ranks for group in groups for op in group}
    kinds = ", ".join(f"{kind.value} {name}" for kind, name in _NAMES.items() if kind in present)
    lines = [f"{kinds}, with the micro-batch's number; dots: idle"]
    if schedule.num_directions > 1:
        lines.append("capitals: direction 0, enters at rank 0; small letters: direction 1, enters at the last rank")
    if any(len(group) > 1 for groups in schedule.ranks for group in groups):
        lines.append("F+b: overlapped, computed under each other's exchange")
    return lines


def _head(rank: int) -> str:
    return f"rank {rank} |"


def _range(values: tuple[float, ...]) -> str:
    shown = list(dict.fromkeys(_number(value) for value in sorted(values)))
    return shown[0] if len(shown) == 1 else f"{shown[0]} to {shown[-1]}"


def _number(value: float) -> str:
    """At most six digits, no trailing zeros; sums of rounded times that miss zero by an ulp are zero."""
    return f"{0.0 if abs(value) < 1e-9 else value:.6g}"
