"""Draws a schedule's timing as SVG: one row per rank, time to the right, measured below planned."""

from collections import defaultdict
from dataclasses import dataclass, field
from html import escape
from itertools import groupby
from textwrap import wrap

from dualpipe.bounds import Bound
from dualpipe.draw.entry import needs_stage_label, number, percent, round_up, size, spread, tick_text
from dualpipe.draw.style import DEFINITIONS, STYLE, legend, style_of
from dualpipe.ir import Group, Op, Operation, Schedule
from dualpipe.runtime.measured import LaneSpan, Measured, measured_bubble, measured_exposed
from dualpipe.simulation import Simulation

_LEFT = 68.0
_RIGHT = 24.0
_TOP = 44.0
_ROW = 30.0
_ROW_GAP = 4.0
_COPY = 2.0  # height of a copy, which is drawn in the gap below its rank
_HEADING = 26.0
_HEADING_LINE = 17.0
_AXIS = 48.0
_LEGEND_LINE = 22.0
_LEAST_WIDTH = 900.0
_MOST_WIDTH = 12_000.0
_LEGEND_WIDTH = 1_150.0
_TICK = 90.0
_LETTER = 6.2
_HEADING_LETTER = 6.7
_LEAST_LABEL_HEIGHT = 11.0
_MAX_LABELED = 8_000  # panels with more operations have no numbers and tooltips: the file would be too large


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Scale from time to pixels: `pixels` for one unit of the costs, maybe a second, for `span` units."""

    pixels: float
    span: float
    is_seconds: bool = False

    @classmethod
    def within_limits(cls, pixels: float, span: float) -> "Scale":
        """Returns the nearest scale that is neither too narrow to read nor too wide to open."""
        if span <= 0:
            return cls(pixels=0.0, span=0.0)
        least = (_LEAST_WIDTH - _LEFT - _RIGHT) / span
        return cls(pixels=min(max(pixels, least), _MOST_WIDTH / span), span=span)

    def x(self, time: float) -> float:
        """Returns the x pixel of a time."""
        return _LEFT + time * self.pixels

    @property
    def width(self) -> float:
        """Width of the picture in pixels."""
        return max(self.x(self.span) + _RIGHT, _LEAST_WIDTH)


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
    """Returns a cell for each group that ran from its first message on, and its waits, in seconds."""
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
    start = working[0].start_seconds
    end = max(span.end_seconds for span in working)
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


def natural_scale(schedule: Schedule, simulation: Simulation, measured: Measured | None = None) -> Scale:
    """Returns a scale that is wide enough for the numbers of 90 % of the cells, within limits."""
    planned = [cell for cell in planned_cells(schedule, simulation) if cell.end > cell.start]
    span = max(simulation.makespan, measured.makespan_seconds if measured else 0.0)
    if not planned or span <= 0:
        return Scale(pixels=0.0, span=0.0)
    needs_stage = _needs_stage_labels(schedule)
    needed = sorted(
        max(_label_width(_label(op, needs_stage[cell.rank])) for op in cell.members) / (cell.end - cell.start)
        for cell in planned
    )
    return Scale.within_limits(pixels=needed[int(0.9 * (len(needed) - 1))], span=span)


def svg(
    schedule: Schedule,
    simulation: Simulation,
    measured: Measured | None = None,
    title: str | None = None,
    *,
    bound: Bound | None = None,
    scale: Scale | None = None,
    rank: int | None = None,
    standalone: bool = True,
) -> str:
    """Returns the picture as one `<svg>` element, with its styles if it is standalone.

    All ranks are drawn, or one `rank`. The spans of a run, in seconds, are drawn below on the same scale, by default
    the natural one of this picture.
    """
    panel_scale = scale or natural_scale(schedule, simulation, measured)
    unit = _unit(panel_scale.span, is_seconds=panel_scale.is_seconds or measured is not None)
    ranks = range(schedule.num_ranks) if rank is None else range(rank, rank + 1)
    picture = _Picture(schedule=schedule, scale=panel_scale, unit=unit, ranks=ranks)
    facts = _planned_facts(simulation, bound, picture.unit)
    heading = f"planned: {facts}" if measured else facts
    top = picture.panel(heading, simulation.makespan, planned_cells(schedule, simulation), [], bound)
    picture.copies(simulation, top)
    if measured is not None:
        facts = _measured_facts(simulation, measured, picture.unit)
        picture.panel(f"measured: {facts}", measured.makespan_seconds, *measured_cells(schedule, measured), None)
    width = min(panel_scale.width - 48, _LEGEND_WIDTH)
    notes = picture.notes()
    explained, lines = legend(schedule, notes, width, has_measured=measured is not None, has_bound=bound is not None)
    picture.parts += [f'<g class="legend" transform="translate(24 {picture.y:.0f})">', *explained, "</g>"]
    name = escape(title or f"{schedule.kind}: {size(schedule)}")
    head = [f"<style>{STYLE}</style>", DEFINITIONS] if standalone else []
    return _element(panel_scale.width, picture.y + lines * _LEGEND_LINE + 8, name, [*head, *picture.parts])


def _element(width: float, height: float, name: str, parts: list[str]) -> str:
    box = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" class="pipeline" {box} role="img" aria-label="{name}">',
            '<rect class="paper" width="100%" height="100%"/>',
            f'<text class="title" x="24" y="32">{name}</text>',
            *parts,
            "</svg>",
        ]
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Unit:
    """Unit for times: `factor` of it are one unit of the costs. Measured times are shown with few digits."""

    factor: float
    name: str

    def text(self, time: float) -> str:
        value = time * self.factor
        return f"{number(value)} {self.name}" if self.name else number(value)


def _unit(span: float, *, is_seconds: bool) -> _Unit:
    if not is_seconds:
        return _Unit(factor=1.0, name="")
    names = ((1.0, 1.0, "s"), (1e-3, 1e3, "ms"), (0.0, 1e6, "\N{MICRO SIGN}s"))
    return next(_Unit(factor=factor, name=name) for least, factor, name in names if span >= least)


def _planned_facts(simulation: Simulation, bound: Bound | None, unit: _Unit) -> str:
    facts = [
        f"makespan {unit.text(simulation.makespan)}",
        f"bubble {percent(simulation.bubble_fraction)}",
        f"exposed exchange {unit.text(max(simulation.exposed, default=0.0))}",
        f"peak activations {spread(simulation.peaks)} of model/P",
    ]
    if bound is not None:
        above = unit.text(simulation.makespan - bound.value)
        facts.append(f"lower bound {unit.text(bound.value)} ({above} below)")
    return ", ".join(facts)


def _measured_facts(simulation: Simulation, measured: Measured, unit: _Unit) -> str:
    bubble = f"bubble {percent(measured_bubble(measured))} (planned {percent(simulation.bubble_fraction)})"
    times = f"makespan {unit.text(measured.makespan_seconds)} (planned {unit.text(simulation.makespan)})"
    return f"{times}, {bubble}, exposed exchange {percent(measured_exposed(measured))} of all ranks' time"


@dataclass(kw_only=True)
class _Picture:
    """Drawing that is written panel by panel, from top to bottom."""

    schedule: Schedule
    scale: Scale
    unit: _Unit
    ranks: range
    y: float = _TOP
    parts: list[str] = field(default_factory=list)
    unlabeled: int = 0
    plain: bool = False

    def __post_init__(self) -> None:
        self._needs_stage = _needs_stage_labels(self.schedule)

    def panel(self, heading: str, end: float, cells: list[Cell], strips: list[Strip], bound: Bound | None) -> float:
        """Adds a heading, a row for each rank, and the time axis. Returns the top of the first row."""
        for line in _lines(heading, int((self.scale.width - 48) / _HEADING_LETTER)):
            self.parts.append(f'<text class="heading" x="24" y="{self.y + 12:g}">{escape(line)}</text>')
            self.y += _HEADING_LINE
        self.y += _HEADING - _HEADING_LINE
        top = self.y
        bottom = self.y + len(self.ranks) * (_ROW + _ROW_GAP)
        for rank in self.ranks:
            self._track(rank, top, end)
        ticks = self._axis(top, bottom)
        self._cells([cell for cell in cells if cell.rank in self.ranks], top)
        self._strips([strip for strip in strips if strip.rank in self.ranks], top)
        self.parts += ticks
        if bound is not None:
            x = self.scale.x(bound.value)
            self.parts.append(f'<line class="bound" x1="{x:.2f}" x2="{x:.2f}" y1="{top - 5:g}" y2="{bottom + 3:g}"/>')
        self.y = bottom + _AXIS
        return top

    def copies(self, simulation: Simulation, top: float) -> None:
        """Adds the copies to and from host memory below each rank, given the top of the first row."""
        shapes: dict[str, list[str]] = defaultdict(list)
        for rank in self.ranks:
            for copy in simulation.copies[rank]:
                x = self.scale.x(copy.start)
                width = (copy.end - copy.start) * self.scale.pixels
                y = self._row(rank, top) + _ROW + (_COPY if copy.operation.kind is Op.RELOAD else 0.0)
                times = f"{self.unit.text(copy.start)} to {self.unit.text(copy.end)}"
                shapes[style_of(copy.operation.kind, 0)].append(
                    f'<rect x="{x:.2f}" y="{y:g}" width="{width:.2f}" height="{_COPY:g}">'
                    f"<title>{copy.operation}: copy of rank {rank}, {times}</title></rect>"
                )
        for style, drawn in sorted(shapes.items()):
            self.parts += [f'<g class="copies {style}">', *drawn, "</g>"]

    def notes(self) -> list[str]:
        if self.plain:
            return ["numbers and tooltips omitted: too many operations"]
        return [f"{self.unlabeled} numbers omitted that do not fit: see tooltips"] if self.unlabeled else []

    def _row(self, rank: int, top: float) -> float:
        return top + self.ranks.index(rank) * (_ROW + _ROW_GAP)

    def _track(self, rank: int, top: float, end: float) -> None:
        y = self._row(rank, top)
        width = end * self.scale.pixels
        self.parts.append(f'<text class="soft" x="{_LEFT - 8:g}" y="{y + 19:g}" text-anchor="end">rank {rank}</text>')
        self.parts.append(f'<rect class="track" x="{_LEFT:g}" y="{y:g}" width="{width:.2f}" height="{_ROW:g}"/>')

    def _axis(self, top: float, bottom: float) -> list[str]:
        """Draws the grid and returns the labels of the ticks, which must be drawn after the cells."""
        labels = []
        pixels = self.scale.pixels / self.unit.factor
        step = round_up(_TICK / pixels) if pixels else 0.0
        count = int(self.scale.span * self.unit.factor / step * (1 + 1e-9)) if step else 0
        for index in range(count + 1):
            x = self.scale.x(index * step / self.unit.factor)
            self.parts.append(f'<line class="grid" x1="{x:.2f}" x2="{x:.2f}" y1="{top:g}" y2="{bottom + 4:g}"/>')
            text = tick_text(index * step)
            labels.append(f'<text class="soft" x="{x:.2f}" y="{bottom + 17:g}" text-anchor="middle">{text}</text>')
        name = f"time in {self.unit.name}" if self.unit.name else "time in units of the costs"
        return [*labels, f'<text class="soft" x="{_LEFT:g}" y="{bottom + 33:g}">{name}</text>']

    def _cells(self, cells: list[Cell], top: float) -> None:
        self.plain = self.plain or sum(len(cell.members) for cell in cells) > _MAX_LABELED
        shapes: dict[str, list[str]] = defaultdict(list)
        numbers: dict[int, list[str]] = {0: [], 1: []}
        for cell in cells:
            x = self.scale.x(cell.start)
            width = (cell.end - cell.start) * self.scale.pixels
            height = _ROW / len(cell.members)
            for index, op in enumerate(cell.members):
                y = self._row(cell.rank, top) + index * height
                variant = self._variant(cell.rank, op)
                style = style_of(op.kind, variant)
                if self.plain:
                    shapes[style].append(f"M{x:.2f} {y:g}h{width:.2f}v{height:g}h-{width:.2f}z")
                    continue
                shapes[style].append(
                    f'<rect x="{x:.2f}" y="{y:g}" width="{width:.2f}" height="{height:g}">'
                    f"<title>{self._tooltip(cell, op)}</title></rect>"
                )
                label = _label(op, self._needs_stage[cell.rank])
                if height >= _LEAST_LABEL_HEIGHT and _label_width(label) <= width + 3:
                    middle = y + height / 2 + 3.8
                    numbers[variant].append(f'<text x="{x + width / 2:.2f}" y="{middle:g}">{label}</text>')
                elif not op.kind.is_copy:
                    self.unlabeled += 1
        for style, drawn in sorted(shapes.items()):
            inner = [f'<path d="{"".join(drawn)}"/>'] if self.plain else drawn
            self.parts += [f'<g class="cells {style}">', *inner, "</g>"]
        self.parts += ['<g class="numbers">', *numbers[0], "</g>", '<g class="numbers on-dark">', *numbers[1], "</g>"]

    def _strips(self, strips: list[Strip], top: float) -> None:
        shapes: dict[str, list[str]] = {"exposed": [], "message": []}
        for strip in strips:
            x = self.scale.x(strip.start)
            width = (strip.end - strip.start) * self.scale.pixels
            if width < 0.5:
                continue
            y = self._row(strip.rank, top)
            # A wait for a message is idle time and drawn blank. An exposed exchange covers only part of the cell.
            y, height = (y, _ROW) if strip.message else (y + _ROW * 0.8, _ROW * 0.2)
            style = "message" if strip.message else "exposed"
            shapes[style].append(f"M{x:.2f} {y:g}h{width:.2f}v{height:g}h-{width:.2f}z")
        self.parts += [f'<path class="{style}" d="{"".join(drawn)}"/>' for style, drawn in shapes.items() if drawn]

    def _variant(self, rank: int, op: Operation) -> int:
        """Returns the shade: the direction, or whether the stage is a later one of the rank."""
        if self.schedule.num_directions > 1:
            return min(op.direction, 1)
        if not self._needs_stage[rank][op.direction]:
            return 0
        first = next(stage for stage, holder in enumerate(self.schedule.placement[0]) if holder == rank)
        return int(op.stage > first)

    def _tooltip(self, cell: Cell, op: Operation) -> str:
        others = " ".join(str(member) for member in cell.members if member != op)
        start = f" from {self.unit.text(cell.start)} on"
        overlap = f", overlapped with {others}" if others else ""
        where = f"rank {cell.rank}, stage {op.stage}, micro-batch {op.micro_batch}, direction {op.direction}"
        return f"{op}: {where}, takes {self.unit.text(cell.end - cell.start)}{start}{overlap}"


def _lines(facts: str, width: int) -> list[str]:
    """Breaks the text into lines, only after commas."""
    glue = "\N{NO-BREAK SPACE}"
    glued = facts.replace(" ", glue).replace(f",{glue}", ", ")
    return [line.replace(glue, " ") for line in wrap(glued, width)]


def _needs_stage_labels(schedule: Schedule) -> list[list[bool]]:
    return [
        [needs_stage_label(schedule, rank, direction) for direction in range(schedule.num_directions)]
        for rank in range(schedule.num_ranks)
    ]


def _label(op: Operation, needs_stage: list[bool]) -> str:
    return f"{op.stage}.{op.micro_batch}" if needs_stage[op.direction] else str(op.micro_batch)


def _label_width(label: str) -> float:
    return len(label) * _LETTER + 6
