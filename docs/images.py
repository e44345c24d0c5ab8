"""Draws the pictures of the documentation, each in light and dark: `python docs/images.py RUN`.

`pipeline-*.svg` shows the planned and measured time of one pipeline, read from the run's trace.json and
schedule.svg. `architecture-*.svg` shows the layers of the project. Standard library only.
"""

import argparse
import json
import re
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from xml.sax.saxutils import escape

FOLDER = Path(__file__).parent / "images"
WIDTH = 880
_LEFT, _ROW, _GAP = 84, 42, 6
_PLANNED_THREADS, _MEASURED_THREAD = (0, 1), 3
_NAME = re.compile(r"^(?:exposed exchange )?([FBIW])(\d+)\.(\d+)('?)$")
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One group of a rank: its time in milliseconds, and the operations that ran overlapped."""

    rank: int
    start: float
    end: float
    members: tuple[tuple[str, int, int], ...]  # kind, direction, micro-batch


def read_cells(trace: dict[str, list[dict]], threads: tuple[int, ...]) -> list[Cell]:
    """Returns a cell per group from the complete events of some threads of a trace."""
    found: dict[tuple[int, int], list[tuple[float, float, tuple[str, int, int]]]] = {}
    for event in trace["traceEvents"]:
        match = _NAME.match(event["name"]) if event["ph"] == "X" and event["tid"] in threads else None
        if match is not None:
            kind, _, micro_batch, prime = match.groups()
            span = (event["ts"] / 1e3, (event["ts"] + event["dur"]) / 1e3, (kind, len(prime), int(micro_batch)))
            found.setdefault((event["pid"], event["args"]["group"]), []).append(span)
    return [
        Cell(
            rank=rank,
            start=min(start for start, _, _ in spans),
            end=max(end for _, end, _ in spans),
            members=tuple(sorted({member for _, _, member in spans})),
        )
        for (rank, _), spans in sorted(found.items())
    ]


def read_headings(svg: str) -> list[str]:
    """Returns the two sentences above the planned and the measured panel, each up to its bubble and in three digits."""
    text = " ".join(unescape(line) for line in re.findall(r'class="heading"[^>]*>([^<]*)<', svg))
    text = re.sub(r"\d+\.\d+", lambda number: f"{float(number[0]):.3g}", text)
    planned, measured = text[: text.index("measured:")], text[text.index("measured:") :]
    return [
        re.sub(r" \(planned[^)]*\)", "", re.match(r"(.*?bubble [\d.]+ %)", part).group(1))
        for part in (planned, measured)
    ]


def draw_pipeline(panels: list[tuple[str, list[Cell]]], title: str, theme: Theme) -> str:
    """Returns the picture of a pipeline: one panel above the other, on one time scale."""
    span = max(cell.end for _, cells in panels for cell in cells)
    ranks = 1 + max(cell.rank for _, cells in panels for cell in cells)
    scale = (WIDTH - _LEFT - 16) / span
    parts, y = [_text(16, 32, title, theme.text, 22, "600")], 44
    for heading, cells in panels:
        parts.append(_text(16, y + 24, heading, theme.soft, 19))
        y += 36
        end = max(cell.end for cell in cells)
        for rank in range(ranks):
            top = y + rank * (_ROW + _GAP)
            parts.append(_text(_LEFT - 10, top + 28, f"rank {rank}", theme.soft, 19, anchor="end"))
            parts.append(_box(_LEFT, top, end * scale, _ROW, theme.track))
        for cell in cells:
            parts += _draw_cell(cell, y, scale, theme)
        y += ranks * (_ROW + _GAP) + 8
    parts += _draw_legend({kind for _, cells in panels for cell in cells for kind, _, _ in cell.members}, y, theme)
    return _svg(WIDTH, y + 66, title, parts, theme)


def _draw_cell(cell: Cell, top: float, scale: float, theme: Theme) -> list[str]:
    parts = []
    height = _ROW / len(cell.members)
    x, width = _LEFT + cell.start * scale, (cell.end - cell.start) * scale
    for index, (kind, direction, micro_batch) in enumerate(cell.members):
        y = top + cell.rank * (_ROW + _GAP) + index * height
        parts.append(_box(x, y, width, height, theme.kinds[kind][direction], theme.paper))
        size = 20 if height > 30 else 17
        if width > 11:
            ink = "#ffffff" if direction else "#16181b"
            parts.append(
                _text(x + width / 2, y + height / 2 + size * 0.36, str(micro_batch), ink, size, anchor="middle")
            )
    return parts


def _draw_legend(kinds: set[str], y: float, theme: Theme) -> list[str]:
    parts, x = [], 16.0
    for kind in (kind for kind in _NAMES if kind in kinds):
        for direction in (0, 1):
            parts.append(_box(x + 20 * direction, y + 6, 20, 18, theme.kinds[kind][direction]))
        parts.append(_text(x + 48, y + 22, _NAMES[kind], theme.soft, 19))
        x += 48 + 9.6 * len(_NAMES[kind]) + 26
    note = "light: enters at rank 0; dark: enters at the last rank; halves: overlapped; gray: idle"
    return [*parts, _text(16, y + 52, note, theme.soft, 19)]


LAYERS = (
    ("launch", "commands: Hydra, built-in launcher, torchrun, Slurm", None),
    ("train", "steps, optimizer, checkpoints, guard, records", None),
    ("infer", "generation: latent cache, drafts by MTP", None),
    ("model", "the network as phases", ("dualpipe", "schedules, interpreter")),
    ("comm", "exchange, transfers", ("data", "text to packed samples")),
    ("kernels", "each operation: plain PyTorch next to Triton", None),
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
            parts.append(_text(x + 128, y + 37, content, theme.soft, 18))
        y += 72
    return _svg(WIDTH, y + 4, "Layers of the project", parts, theme)


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


def main() -> None:
    """Writes all pictures next to this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a run that drew its pictures")
    run = parser.parse_args().run
    trace = json.loads((run / "trace.json").read_text("utf-8"))
    headings = read_headings((run / "schedule.svg").read_text("utf-8"))
    panels = list(
        zip(headings, (read_cells(trace, _PLANNED_THREADS), read_cells(trace, (_MEASURED_THREAD,))), strict=True)
    )
    title = re.search(r'class="title"[^>]*>([^<]*)<', (run / "schedule.svg").read_text("utf-8")).group(1)
    FOLDER.mkdir(exist_ok=True)
    for theme in THEMES:
        (FOLDER / f"pipeline-{theme.name}.svg").write_text(draw_pipeline(panels, unescape(title), theme), "utf-8")
        (FOLDER / f"architecture-{theme.name}.svg").write_text(draw_architecture(theme), "utf-8")


if __name__ == "__main__":
    main()
