"""Draws the step of one rank as HTML: a strip of the whole step, and its operations in rows."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape

from dualpipe.draw.entry import NAMES, needs_stage_label
from dualpipe.draw.style import COPIES, DARK, LIGHT, style_of
from dualpipe.ir import Op, Operation
from train.planner.timing import TimedPlan
from train.report.figures import seconds

_GROUPS_OF_ROW = 12
_MOST_ROWS = 40
_MOST_CELLS = 1500
"""Cells of the strip, below the width of a screen in pixels."""
PAIR, UPDATE = "pair", "update"
"""Classes of a forward with a backward, and of the optimizer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupBox:
    """Operations that run together, or the optimizer.

    Attributes:
        start: in seconds.
        end: in seconds.
        styles: class of each operation, from top to bottom.
        labels: short text of each operation.
        about: text that a pointer shows.
    """

    start: float
    end: float
    styles: tuple[str, ...]
    labels: tuple[str, ...]
    about: str


def timeline(timed: TimedPlan) -> str:
    """Returns the strip and the rows of the busiest rank, without the declared factor.

    Args:
        timed: a plan with at least one operation.
    """
    cells = list(_cells(timed))
    span = max((cell.end for cell in cells), default=0.0)
    if span <= 0:
        return ""
    number = min(math.ceil(len(cells) / _GROUPS_OF_ROW), 10 * _MOST_ROWS)
    rows = [_row(cells, place, span / number) for place in range(number)]
    left_out = number - _MOST_ROWS
    if left_out > 0:
        half, width = _MOST_ROWS // 2, span / number
        text = f"From {seconds(half * width)} to {seconds((half + left_out) * width)} only the strip shows the step."
        rows[half : half + left_out] = [f'<p class="gap">{escape(text)}</p>']
    strip = "".join(_box(cell, 0.0, span, has_labels=False) for cell in _merged(cells, span))
    axis = f"<span>0 s</span><span>the whole step</span><span>{seconds(span)}</span>"
    return (
        f'{_legend(timed)}<p class="time-axis">{axis}</p>'
        f'<div class="strip track" role="img" aria-label="strip of the whole step">{strip}</div>'
        f'<div class="rows">{"".join(rows)}</div>'
    )


def style_sheet() -> str:
    """Returns the style of operations: the colors of the pictures of schedules."""
    light = "".join(
        f".{style_of(kind, 0)}{{background:{color};color:#16181b}}" for kind, color in (LIGHT | COPIES).items()
    )
    hatch = "repeating-linear-gradient(135deg,#fff3 0 2px,#0000 2px 6px)"
    dark = "".join(f".{style_of(kind, 1)}{{background:{hatch},{color};color:#fff}}" for kind, color in DARK.items())
    both = f".{PAIR}{{background:linear-gradient({LIGHT[Op.FORWARD]} 50%,{LIGHT[Op.BACKWARD]} 50%)}}"
    return f"{light}{dark}{both}.{UPDATE}{{background:var(--c5);color:var(--paper)}}"


def _cells(timed: TimedPlan) -> Iterator[GroupBox]:
    """Yields the groups of the busiest rank, then the optimizer."""
    rank, schedule, simulation = timed.time.busiest, timed.schedule, timed.simulation
    held = schedule.stages_of(rank)
    names_stage = [needs_stage_label(schedule, rank, direction) for direction in range(schedule.num_directions)]
    for group, start, end in zip(schedule.ranks[rank], simulation.starts[rank], simulation.ends[rank], strict=True):
        if end <= start:  # a reload only starts its copy
            continue
        is_two_way = schedule.num_directions > 1
        variants = [op.direction if is_two_way else int((op.direction, op.stage) != held[0]) for op in group]
        yield GroupBox(
            start=start,
            end=end,
            styles=tuple(style_of(op.kind, variant) for op, variant in zip(group, variants, strict=True)),
            labels=tuple(_label(op, is_named=names_stage[op.direction]) for op in group),
            about=f"{' and '.join(map(_about, group))}; from {start:.3f} to {end:.3f} s",
        )
    if timed.time.optimizer > 0:
        start = simulation.makespan
        end = start + timed.time.optimizer
        yield GroupBox(
            start=start,
            end=end,
            styles=(UPDATE,),
            labels=("optimizer",),
            about=f"optimizer; from {start:.3f} to {end:.3f} s",
        )


def _label(op: Operation, *, is_named: bool) -> str:
    stage = f"{op.stage}." if is_named else ""
    return f"{op.kind.value}{stage}{op.micro_batch}"


def _about(op: Operation) -> str:
    direction = ", direction 1" if op.direction else ""
    return f"{NAMES[op.kind]} of micro-batch {op.micro_batch}, stage {op.stage}{direction}"


def _merged(cells: Sequence[GroupBox], span: float) -> list[GroupBox]:
    """Returns fewer cells for the strip: neighbors of one kind are one cell if there are too many.

    Idle time below a pixel between two of them is lost, which only the strip does not show.
    """
    if len(cells) <= _MOST_CELLS:
        return list(cells)
    merged: list[GroupBox] = []
    for cell in cells:
        last = merged[-1] if merged else None
        is_near = last is not None and cell.start - last.end < span / _MOST_CELLS
        kinds = sorted(style[:-1] for style in cell.styles)
        if last is not None and is_near and sorted(style[:-1] for style in last.styles) == kinds:
            merged[-1] = replace(last, end=cell.end, about=f"many groups until {cell.end:.3f} s")
        else:
            merged.append(cell)
    return merged


def _row(cells: Sequence[GroupBox], place: int, width: float) -> str:
    """Returns one part of the step with labels, or nothing if the rank is idle in it."""
    start, end = place * width, (place + 1) * width
    inside = [cell for cell in cells if cell.start < end - 1e-9 * width and cell.end > start + 1e-9 * width]
    boxes = "".join(_box(cell, start, width, has_labels=True) for cell in inside)
    about = escape(f"from {seconds(start)} to {seconds(end)}: {len(inside)} groups")
    return (
        f'<span class="name">{start:.2f} s</span><div class="line track" role="img" aria-label="{about}">{boxes}</div>'
    )


def _box(cell: GroupBox, origin: float, width: float, *, has_labels: bool) -> str:
    """Returns a cell within a part of the step. Its label is where most of it is."""
    start, end = max(cell.start, origin), min(cell.end, origin + width)
    is_labeled = has_labels and end - start >= 0.5 * (cell.end - cell.start)
    halves = "".join(
        f'<i class="{style}">{f"<span>{escape(label)}</span>" if is_labeled else ""}</i>'
        for style, label in zip(cell.styles, cell.labels, strict=True)
    )
    left, size = 100 * (start - origin) / width, 100 * (end - start) / width
    return f'<div class="cell" style="left:{left:.3f}%;width:{size:.3f}%" title="{escape(cell.about)}">{halves}</div>'


def _legend(timed: TimedPlan) -> str:
    present = {op.kind for group in timed.schedule.ranks[timed.time.busiest] for op in group}
    items = []
    for kind, name in NAMES.items():
        if kind not in present:
            continue
        variants = (0,) if kind.is_copy or not _has_shades(timed) else (0, 1)
        swatches = "".join(f'<i class="swatch {style_of(kind, variant)}"></i>' for variant in variants)
        items.append(f"<span>{swatches}{kind.value} {escape(name)}</span>")
    if timed.time.optimizer > 0:
        items.append(f'<span><i class="swatch {UPDATE}"></i>optimizer</span>')
    items.append('<span><i class="swatch track"></i>bubble</span>')
    if timed.schedule.num_directions > 1:
        items.append("<span>dark, hatched: direction 1, which enters at the last rank</span>")
    elif _has_shades(timed):
        items.append("<span>dark, hatched: a later stage of the rank</span>")
    if any(len(group) > 1 for group in timed.schedule.ranks[timed.time.busiest]):
        items.append("<span>one above the other: overlapped</span>")
    return f'<div class="legend">{"".join(items)}</div>'


def _has_shades(timed: TimedPlan) -> bool:
    return timed.schedule.num_directions > 1 or len(timed.schedule.stages_of(timed.time.busiest)) > 1
