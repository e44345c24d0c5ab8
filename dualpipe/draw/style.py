"""Defines how pages look: colors of schedules, and the HTML document around every page.

There is one hue per kind of operation and one shade per direction. They are distinct for color-blind readers: the hues
also differ in lightness, and the second direction is dark and hatched with light numbers. A document's policy allows
only its own script and style, and no network: pages show names, answers and errors that may be hostile. The policy
blocks `style` attributes too, so they become rules of the style sheet.
"""

import base64
import hashlib
import re
from dataclasses import dataclass
from html import escape
from pathlib import Path

from dualpipe.draw.entry import NAMES
from dualpipe.ir import Op, Schedule

LIGHT = {
    Op.FORWARD: "#7db8f2",
    Op.BACKWARD: "#f08a62",
    Op.BACKWARD_INPUT: "#ffe98a",
    Op.BACKWARD_WEIGHT: "#b9e3cf",
}
DARK = {
    Op.FORWARD: "#2163c9",
    Op.BACKWARD: "#8a2500",
    Op.BACKWARD_INPUT: "#927600",
    Op.BACKWARD_WEIGHT: "#004741",
}
COPIES = {Op.OFFLOAD: "#ba9fb8", Op.RELOAD: "#788873"}
_SWATCH_WIDTH = 26.0
_SWATCH_HEIGHT = 14.0
_LETTER = 6.5
_GAP = 22.0


def style_of(kind: Op, variant: int) -> str:
    """Returns the CSS class of a cell: the kind's letter, then 0 for light (all copies) or 1 for dark."""
    return f"{kind.value}{0 if kind.is_copy else variant}"


def _fills() -> str:
    light = "".join(f".pipeline .{style_of(kind, 0)}{{fill:{color}}}" for kind, color in (LIGHT | COPIES).items())
    dark = "".join(f".pipeline .{style_of(kind, 1)}{{fill:url(#dark-{kind.value})}}" for kind in DARK)
    return light + dark


def _pattern(name: str, ground: str, line: str, opacity: float) -> str:
    return (
        f'<pattern id="{name}" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        f'<rect width="6" height="6" fill="{ground}"/>'
        f'<rect width="1.6" height="6" fill="{line}" opacity="{opacity}"/></pattern>'
    )


STYLE = (
    ".pipeline text{font-family:ui-sans-serif,'Segoe UI',Helvetica,Arial,'DejaVu Sans',sans-serif;font-size:12px;"
    "fill:#1c1e21}"
    ".pipeline .paper{fill:#fff}.pipeline .track{fill:#eef0f2}.pipeline .soft{fill:#5c6370}"
    ".pipeline .title{font-size:17px;font-weight:600}"
    ".pipeline .grid{stroke:#d5d9de;stroke-width:1}"
    ".pipeline .bound{stroke:#c2185b;stroke-width:1.5;stroke-dasharray:5 4}"
    ".pipeline .cells rect,.pipeline .cells path{stroke:#fff;stroke-width:.7}"
    ".pipeline .numbers{pointer-events:none;text-anchor:middle}.pipeline .numbers text{font-size:10.5px;fill:#16181b}"
    ".pipeline .numbers.on-dark text{fill:#fff}"
    ".pipeline .exposed{fill:url(#exposed)}.pipeline .message{fill:#eef0f2}"
    f"{_fills()}"
    "@media (prefers-color-scheme:dark){"
    ".pipeline text{fill:#e6e8eb}.pipeline .paper{fill:#15181c}.pipeline .track,.pipeline .message{fill:#22262c}"
    ".pipeline .soft{fill:#a2a9b4}.pipeline .grid{stroke:#363c45}.pipeline .bound{stroke:#ff6f9f}"
    ".pipeline .cells rect,.pipeline .cells path{stroke:#15181c}"
    "}"
)
DEFINITIONS = (
    "<defs>"
    + "".join(_pattern(f"dark-{kind.value}", color, "#fff", 0.22) for kind, color in DARK.items())
    + _pattern("exposed", "#55595f", "#fff", 0.75)
    + "</defs>"
)


@dataclass(frozen=True, slots=True)
class _Item:
    styles: tuple[str, ...]
    text: str

    @property
    def width(self) -> float:
        return (_SWATCH_WIDTH + 6 if self.styles else 0.0) + len(self.text) * _LETTER + _GAP


def legend(
    schedule: Schedule, notes: list[str], width: float, *, has_measured: bool, has_bound: bool
) -> tuple[list[str], int]:
    """Returns the legend's elements, from (0, 0) and within a width in pixels, and its number of lines."""
    parts: list[str] = []
    x = 0.0
    line = 0
    for item in [
        *_kinds(schedule),
        *_marks(schedule, has_measured=has_measured, has_bound=has_bound),
        *(_Item((), note) for note in notes),
    ]:
        if x > 0 and x + item.width - _GAP > width:
            x = 0.0
            line = line + 1
        parts += _drawn(item, x, line * 22.0)
        x += item.width
    return parts, line + 1


def _kinds(schedule: Schedule) -> list[_Item]:
    present = {op.kind for groups in schedule.ranks for group in groups for op in group}
    variants = (0, 1) if _shades(schedule) else (0,)
    return [
        _Item(tuple(dict.fromkeys(style_of(kind, variant) for variant in variants)), f"{kind.value} {name}")
        for kind, name in NAMES.items()
        if kind in present
    ]


def _shades(schedule: Schedule) -> str | None:
    """Returns the meaning of the two shades, or None if there is only one."""
    if schedule.num_directions > 1:
        return "light: direction 0; dark, hatched: direction 1, enters at the last rank"
    if any(len(schedule.stages_of(rank)) > 1 for rank in range(schedule.num_ranks)):
        return "light: the rank's first stage; dark, hatched: a later one (stage.micro-batch)"
    return None


def _marks(schedule: Schedule, *, has_measured: bool, has_bound: bool) -> list[_Item]:
    items = []
    if (shades := _shades(schedule)) is not None:
        items.append(_Item((), shades))
    pair = next((group[:2] for groups in schedule.ranks for group in groups if len(group) > 1), None)
    if pair is not None:
        items.append(_Item(("half", *(style_of(op.kind, half) for half, op in enumerate(pair))), "halves: overlapped"))
    items.append(_Item(("track",), "idle"))
    if has_measured:
        items.append(_Item(("exposed",), "exposed exchange"))
    if has_bound:
        items.append(_Item(("bound",), "lower bound of any schedule with this placement"))
    return items


def _drawn(item: _Item, x: float, y: float) -> list[str]:
    text_x = x + (_SWATCH_WIDTH + 6 if item.styles else 0.0)
    text = f'<text class="soft" x="{text_x:g}" y="{y + 11:g}">{escape(item.text)}</text>'
    return [*_swatch(item.styles, x, y), text]


def _swatch(styles: tuple[str, ...], x: float, y: float) -> list[str]:
    if styles == ("bound",):
        return [f'<line class="bound" x1="{x:g}" x2="{x + _SWATCH_WIDTH:g}" y1="{y + 7:g}" y2="{y + 7:g}"/>']
    if styles[:1] == ("half",):
        height = _SWATCH_HEIGHT / 2
        return [_box(style, x, y + row * height, _SWATCH_WIDTH, height) for row, style in enumerate(styles[1:])]
    width = _SWATCH_WIDTH / max(len(styles), 1)
    return [_box(style, x + index * width, y, width, _SWATCH_HEIGHT) for index, style in enumerate(styles)]


def _box(style: str, x: float, y: float, width: float, height: float) -> str:
    return f'<rect class="{style}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"/>'


_STYLE = Path(__file__).with_name("document.css")
_STYLE_ATTRIBUTE = re.compile(r'(?<=\s)style="([^"{}<>]*)"')


def document(title: str, body: str, style: str, script: str = "", *, has_images: bool = False) -> str:
    """Returns a whole document with images only as `data:` addresses.

    Args:
        body: HTML in which every outside string is escaped; its script elements must hold data only.
        style: style sheet, added to the one that all documents share.
        script: runs after the body was read; empty for none.
    """
    rules: dict[str, str] = {}
    body = _STYLE_ATTRIBUTE.sub(lambda match: f'data-style="{rules.setdefault(match[1], str(len(rules)))}"', body)
    style = (
        _STYLE.read_text(encoding="utf-8")
        + style
        + "".join(f'\n:root [data-style="{name}"]{{{rule}}}' for rule, name in rules.items())
    )
    policy = ["default-src 'none'", f"style-src '{_digest(style)}'", "base-uri 'none'", "form-action 'none'"]
    policy += ["require-trusted-types-for 'script'"]
    policy += [f"script-src '{_digest(script)}'"] if script else []
    policy += ["img-src data:"] if has_images else []
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{"; ".join(policy)}">
<title>{escape(title)}</title>
<style>{style}</style>
</head>
<body>
{body}
{f"<script>{script}</script>" if script else ""}
</body>
</html>
"""


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode('ascii')}"
