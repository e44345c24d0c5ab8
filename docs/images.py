"""Draws the pictures of the documentation, each in light and dark: `python docs/images.py`.

`pipeline-*.svg` shows DualPipe next to 1F1B for 8 ranks and 20 micro-batches, from the simulator, and DualPipe as 8
gloo ranks ran it. The stages of that run sleep for the time of each operation, so that 8 ranks do not compete for the
cores of one machine; schedule, interpreter and transfers are those of training. `ends-*.svg` shows the same two
schedules on 4 ranks. `pair-*.svg` shows the phases of a forward and a backward on two lanes, in the order that
`dualpipe/runtime/pairing.py` gives them. `architecture-*.svg` shows the layers of the project. `published-*.svg` shows
the plans of `launch.plan published=all` over published speeds. A name as argument draws that picture alone.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench.grouped_stages import measure_spans
from dualpipe.builder import build_schedule
from dualpipe.costs import Costs, uniform
from dualpipe.draw.svg import Cell, measured_cells, planned_cells
from dualpipe.ir import Op, Operation, Schedule
from dualpipe.runtime.compile import Pairing, compile_rank
from dualpipe.runtime.pairing import overlapped, sequential
from dualpipe.runtime.program import Action
from dualpipe.simulation import simulate
from launch.plan import answer_request
from launch.plan_request import read_request
from model.stage import block_lanes

FOLDER = Path(__file__).parent / "images"
WIDTH = 880
NUM_RANKS, NUM_MICRO_BATCHES, BLOCKS = 8, 20, 4
COSTS = Costs(forward=1.0, backward_input=1.0, backward_weight=1.0, exchange=1.0, latency=0.0)
UNIT_SECONDS = 0.16
_LEFT, _ROW, _GAP = 70, 21, 2
_TITLES = {"1f1b": "1F1B, exchanges of experts wait", "dualpipe": "DualPipe, exchanges behind computation"}
_NAMES = {"F": "forward", "B": "backward", "I": "backward for inputs", "W": "backward for weights"}
_FONT = "font-family:ui-sans-serif,'Segoe UI',Helvetica,Arial,'DejaVu Sans',sans-serif"


@dataclass(frozen=True, slots=True, kw_only=True)
class Theme:
    """Colors of one picture. An operation's color is that of its kind in direction 0, or in direction 1."""

    name: str
    paper: str
    text: str
    soft: str
    track: str
    box: str
    kinds: dict[str, tuple[str, str]]


_KINDS = {
    "F": ("#7db8f2", "#2163c9"),
    "B": ("#f08a62", "#8a2500"),
    "I": ("#ffe98a", "#927600"),
    "W": ("#b9e3cf", "#004741"),
}
THEMES = (
    Theme(name="light", paper="#ffffff", text="#1c1e21", soft="#5c6370", track="#eceef1", box="#f4f6f8", kinds=_KINDS),
    Theme(name="dark", paper="#0d1117", text="#e6edf3", soft="#9aa4af", track="#21262d", box="#161b22", kinds=_KINDS),
)


def simulated_panel(kind: str, num_ranks: int = NUM_RANKS, num_micro_batches: int = NUM_MICRO_BATCHES) -> "Panel":
    """Returns the panel of a schedule whose stages are equal and whose exchange takes as long as a forward."""
    costs = uniform(COSTS, num_ranks, num_ranks)
    schedule = build_schedule(kind, num_ranks, num_micro_batches, costs)
    simulation = simulate(schedule, costs)
    return Panel(
        heading=f"{_TITLES[kind]}, simulated: {simulation.makespan:g} units",
        cells=planned_cells(schedule, simulation),
    )


def measured_panel(kind: str) -> "Panel":
    """Returns the panel of a run of gloo ranks whose stages sleep."""
    seconds = {name: value * UNIT_SECONDS for name, value in asdict(COSTS).items() if value is not None}
    costs = uniform(Costs(**seconds), NUM_RANKS, NUM_RANKS)
    schedule = build_schedule(kind, NUM_RANKS, NUM_MICRO_BATCHES, costs)
    measured = measure_spans(schedule, costs, BLOCKS)
    cells = [
        replace(cell, start=cell.start / UNIT_SECONDS, end=cell.end / UNIT_SECONDS)
        for cell in measured_cells(schedule, measured)[0]
    ]
    units = measured.makespan_seconds / UNIT_SECONDS
    heading = f"The same DualPipe as 8 gloo ranks ran it, with stages that sleep: {units:.3g} units"
    return Panel(heading=heading, cells=cells)


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One picture of all ranks' time, in units of a forward."""

    heading: str
    cells: list[Cell]


def draw_pipeline(panels: Sequence[Panel], title: str, theme: Theme, num_ranks: int = NUM_RANKS) -> str:
    """Returns the picture of a pipeline: one panel above the other, on one time scale."""
    span = max(cell.end for panel in panels for cell in panel.cells)
    scale = (WIDTH - _LEFT - 16) / span
    parts = [_text(16, 32, title, theme.text, 21, "600")]
    y = 44.0
    for panel in panels:
        parts.append(_text(16, y + 20, panel.heading, theme.soft, 17))
        y += 30
        end = max(cell.end for cell in panel.cells)
        for rank in range(num_ranks):
            top = y + rank * (_ROW + _GAP)
            parts.append(_text(_LEFT - 8, top + 16, f"rank {rank}", theme.soft, 15, anchor="end"))
            parts.append(_box(_LEFT, top, end * scale, _ROW, theme.track))
        for cell in panel.cells:
            parts += _draw_cell(cell, y, scale, theme)
        y += num_ranks * (_ROW + _GAP) + 6
    kinds = {member.kind.value for panel in panels for cell in panel.cells for member in cell.members}
    parts += _draw_legend(kinds, y, theme, num_ranks)
    return _svg(WIDTH, y + 84, title, parts, theme)


def _draw_cell(cell: Cell, top: float, scale: float, theme: Theme) -> list[str]:
    parts = []
    height = _ROW / len(cell.members)
    x = _LEFT + cell.start * scale
    width = (cell.end - cell.start) * scale
    for index, member in enumerate(cell.members):
        y = top + cell.rank * (_ROW + _GAP) + index * height
        parts.append(_box(x, y, width, height, theme.kinds[member.kind.value][member.direction], theme.paper))
        size = 13 if height > 15 else 10.5
        if width > 11:
            ink = "#ffffff" if member.direction else "#16181b"
            label = str(member.micro_batch)
            parts.append(_text(x + width / 2, y + height / 2 + size * 0.36, label, ink, size, anchor="middle"))
    return parts


def _draw_legend(kinds: set[str], y: float, theme: Theme, num_ranks: int) -> list[str]:
    parts, x = [], 16.0
    for kind in (kind for kind in _NAMES if kind in kinds):
        for direction in (0, 1):
            parts.append(_box(x + 20 * direction, y + 6, 20, 18, theme.kinds[kind][direction]))
        parts.append(_text(x + 48, y + 21, _NAMES[kind], theme.soft, 17))
        x += 48 + 8.6 * len(_NAMES[kind]) + 26
    note = f"light: enters at rank 0; dark: enters at rank {num_ranks - 1}; halves: overlapped; gray: idle"
    unit = "1 unit: a forward, a backward for inputs or for weights, or an exchange of one micro-batch on one rank"
    return [*parts, _text(16, y + 48, note, theme.soft, 15), _text(16, y + 70, unit, theme.soft, 15)]


_PHASES = ("attend", "dispatch", "experts", "combine")
_ACTIONS = {Action.FORWARD: "F", Action.BACKWARD: "I", Action.WEIGHT: "W"}
_NUM_BLOCKS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseSpan:
    """When a phase runs, on which lane, in units of a phase."""

    lane: str
    name: str
    kind: str
    direction: int
    start: float


def phase_spans(pairing: Pairing) -> list[PhaseSpan]:
    """Returns the phases of a forward and a backward in one group, through MoE blocks, as a rank's program runs them.

    Every phase takes one unit. A computation starts when its lane is free and the exchange that it waits for has ended.
    """
    earlier = (Operation(Op.FORWARD, 1, 0, 0),)
    pair = (Operation(Op.FORWARD, 0, 0, 0), Operation(Op.BACKWARD, 1, 0, 0))
    whole = Schedule(kind="pair", num_ranks=1, num_micro_batches=2, placement=((0,), (0,)), ranks=((earlier, pair),))
    lanes = {0: block_lanes(is_dense=False) * _NUM_BLOCKS}
    steps = compile_rank(whole, 0, lanes, pairing).steps
    first = next(i for i, step in enumerate(steps) if step.run.direction == 0 or step.action is Action.BACKWARD)
    spans = []
    free = {"compute": 0.0, "comm": 0.0}
    ends: dict[int, float] = {}
    for step in steps[first:]:
        if step.action is Action.WAIT:
            free["compute"] = max(free["compute"], ends[step.run.direction])
        if step.action in _ACTIONS:
            lane = lanes[0][step.phase]
            start = max(free[lane], free["compute"])
            free[lane] = start + 1
            ends[step.run.direction] = start + 1
            name = _PHASES[step.phase % len(_PHASES)]
            kind = _ACTIONS[step.action]
            spans.append(PhaseSpan(lane=lane, name=name, kind=kind, direction=step.run.direction, start=start))
    return spans


def draw_pair(theme: Theme) -> str:
    """Returns the picture of a forward and a backward, one after the other and overlapped, on two lanes."""
    title = f"A forward and a backward through {_NUM_BLOCKS} MoE blocks on one rank"
    panels = {"One after the other": phase_spans(sequential), "Overlapped": phase_spans(overlapped)}
    unit = (WIDTH - _LEFT - 30) / max(span.start + 1 for spans in panels.values() for span in spans)
    parts = [_text(16, 32, title, theme.text, 21, "600")]
    y = 44.0
    for heading, spans in panels.items():
        end = max(span.start + 1 for span in spans)
        parts.append(_text(16, y + 20, f"{heading}: {end:g} units", theme.soft, 17))
        y += 30
        for row, lane in enumerate(("compute", "comm")):
            top = y + row * 34
            parts.append(_text(_LEFT + 6, top + 21, lane, theme.soft, 15, anchor="end"))
            parts.append(_box(_LEFT + 14, top, end * unit, 30, theme.track))
            for span in (span for span in spans if span.lane == lane):
                x = _LEFT + 14 + span.start * unit
                parts.append(_box(x, top, unit, 30, theme.kinds[span.kind][span.direction], theme.paper))
                ink = "#ffffff" if span.direction else "#16181b"
                label = "weights" if span.kind == "W" else span.name
                parts.append(_text(x + unit / 2, top + 19, label, ink, min(13, unit / 4.6), anchor="middle"))
        y += 76
    note = "blue: forward of one micro-batch; brown: backward for inputs of another; green: its weights; gray: idle"
    parts.append(_text(16, y + 16, note, theme.soft, 15))
    return _svg(WIDTH, y + 32, title, parts, theme)


LAYERS = (
    ("launch", "commands: Hydra, built-in launcher, torchrun, Slurm", None),
    ("planner", "time, memory, layouts", ("verify", "equality, golden steps")),
    ("train", "steps, optimizer, checkpoints, guard, records", None),
    ("evaluation", "benchmarks of a checkpoint", None),
    ("infer", "generation: latent cache, drafts by MTP", None),
    ("score", "what answers are worth", None),
    ("model", "the network as phases", ("dualpipe", "schedules, interpreter")),
    ("comm", "exchange, transfers", ("data", "text to samples")),
    ("kernels", "each operation: plain PyTorch next to Triton", None),
    ("base", "registry, ranges, errors, files", None),
)


def draw_architecture(theme: Theme) -> str:
    """Returns the layers, from commands down to kernels."""
    parts, y = [_text(16, 34, "Imports go downward only", theme.text, 22, "600")], 50
    for name, summary, neighbor in LAYERS:
        boxes = [(name, summary)] if neighbor is None else [(name, summary), neighbor]
        width = (WIDTH - 32 - 16 * (len(boxes) - 1)) / len(boxes)
        for index, (folder, content) in enumerate(boxes):
            x = 16 + index * (width + 16)
            parts.append(_box(x, y, width, 60, theme.box, theme.soft))
            parts.append(_text(x + 16, y + 37, f"{folder}/", theme.text, 20, "600"))
            parts.append(_text(x + 146, y + 37, content, theme.soft, 18))
        y += 72
    return _svg(WIDTH, y + 4, "Layers of the project", parts, theme)


_SPEEDS = (10.0, 100_000.0)
"""Limits of both axes of published runs, in tokens per second and GPU."""


def draw_published(theme: Theme) -> str:
    """Returns predicted over published speeds of public runs, with bars, on logarithmic axes."""
    left, top, size = 96.0, 84.0, WIDTH - 340.0
    low, high = map(math.log10, _SPEEDS)

    def place(speed: float) -> float:
        return size * (math.log10(max(speed, _SPEEDS[0])) - low) / (high - low)

    title = "Speed of public runs, tokens/s per GPU"
    parts = [_text(16, 34, title, theme.text, 21, "600"), _box(left, top, size, size, theme.box, theme.soft)]
    parts += [_text(left - 10, top - 14, "predicted", theme.soft, 15, anchor="end")]
    parts += [_text(left + size, top + size + 46, "published", theme.soft, 15, anchor="end")]
    parts.append(_line(left, top + size, left + size, top, theme.soft))
    for power in range(round(low), round(high) + 1):
        parts.append(
            _text(left - 10, top + size - place(10**power) + 5, f"{10**power:,}", theme.soft, 14, anchor="end")
        )
        parts.append(_text(left + place(10**power), top + size + 22, f"{10**power:,}", theme.soft, 14, anchor="middle"))
    inks = {"fitted": theme.kinds["F"][0], "held out": theme.kinds["F"][1], "outside": theme.kinds["B"][0]}
    for row in sorted(_published_rows(), key=lambda row: row["half"]):
        x = left + place(row["published"])
        ink = inks[row["half"] if row["inside"] else "outside"]
        least, center, most = (top + size - place(row[key]) for key in ("least", "predicted", "most"))
        parts += [_line(x, least, x, most, ink, 2), f'<circle cx="{x:.1f}" cy="{center:.1f}" r="4.5" fill="{ink}"/>']
    labels = {"fitted": "fitted half", "held out": "held-out half", "outside": "published is outside"}
    for index, (name, label) in enumerate(labels.items()):
        parts.append(_box(left + size + 28, top + 8 + 28 * index, 18, 18, inks[name]))
        parts.append(_text(left + size + 54, top + 22 + 28 * index, label, theme.soft, 15))
    return _svg(WIDTH, top + size + 64, title, parts, theme)


@cache
def _published_rows() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = answer_request(read_request(["published=all"])).values["runs"]
    return rows


def _line(x: float, y: float, to_x: float, to_y: float, color: str, width: float = 1) -> str:
    return f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}" stroke="{color}" stroke-width="{width}"/>'


def _text(x: float, y: float, text: str, color: str, size: float, weight: str = "400", anchor: str = "start") -> str:
    style = f'font-size="{size:g}" font-weight="{weight}" fill="{color}" text-anchor="{anchor}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'


def _box(x: float, y: float, width: float, height: float, color: str, line: str = "none") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return f'<rect {place} fill="{color}" stroke="{line}" stroke-width="0.8"/>'


def _svg(width: float, height: float, name: str, parts: list[str], theme: Theme) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img" style="{_FONT}">'
    background = f'<rect width="100%" height="100%" rx="8" fill="{theme.paper}"/>'
    return "\n".join([head, f"<title>{escape(name)}</title>", background, *parts, "</svg>", ""])


def draw_ends(theme: Theme) -> str:
    """Returns the picture of 1F1B and DualPipe on few ranks."""
    panels = [simulated_panel(kind, 4, 8) for kind in ("1f1b", "dualpipe")]
    return draw_pipeline(panels, "4 ranks, 8 micro-batches", theme, 4)


def draw_run(theme: Theme) -> str:
    """Returns the picture of 1F1B, DualPipe, and DualPipe as ranks ran it."""
    title = f"1F1B and DualPipe, {NUM_RANKS} ranks, {NUM_MICRO_BATCHES} micro-batches"
    return draw_pipeline(_run_panels(), title, theme)


@cache
def _run_panels() -> tuple[Panel, ...]:
    return simulated_panel("1f1b"), simulated_panel("dualpipe"), measured_panel("dualpipe")


PICTURES = {
    "pipeline": draw_run,
    "ends": draw_ends,
    "pair": draw_pair,
    "architecture": draw_architecture,
    "published": draw_published,
}


def main() -> None:
    """Writes all pictures, or those that the arguments name, next to this file."""
    FOLDER.mkdir(exist_ok=True)
    for name in sys.argv[1:] or PICTURES:
        for theme in THEMES:
            (FOLDER / f"{name}-{theme.name}.svg").write_text(PICTURES[name](theme), "utf-8")


if __name__ == "__main__":
    main()
