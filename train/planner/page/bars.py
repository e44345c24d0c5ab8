"""Draws stacked bars with a line for a limit, as HTML that fits any width."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

Format = Callable[[float], str]


@dataclass(frozen=True, slots=True)
class BarPart:
    """A part that all bars have: its name, and the class of its color."""

    name: str
    style: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """One bar: a label, and the sizes of its parts in the order of the legend."""

    label: str
    sizes: tuple[float, ...]

    @property
    def total(self) -> float:
        """The length of the bar."""
        return sum(self.sizes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """A line through all bars."""

    name: str
    size: float


def stacked_bars(parts: Sequence[BarPart], bars: Sequence[Bar], show: Format, limit: Limit | None = None) -> str:
    """Returns a legend and the bars on a common scale, or nothing if no bar has a length.

    Args:
        limit: a line; None for none.
    """
    longest = max((bar.total for bar in bars), default=0.0)
    if not longest > 0 or not math.isfinite(longest):
        return ""
    span = max(longest, limit.size if limit is not None else 0.0)
    line = "" if limit is None else f'<b class="limit" style="left:{100 * limit.size / span:.2f}%"></b>'
    rows = "".join(_row(parts, bar, span, show, line) for bar in bars)
    present = [part for place, part in enumerate(parts) if any(bar.sizes[place] > 0 for bar in bars)]
    return f'{_legend(present, limit, show)}<div class="bars">{rows}</div>'


def _legend(parts: Sequence[BarPart], limit: Limit | None, show: Format) -> str:
    items = [f'<span><i class="swatch {part.style}"></i>{escape(part.name)}</span>' for part in parts]
    if limit is not None:
        text = escape(f"{limit.name}, {show(limit.size)}")
        items.append(f'<span><i class="limit-swatch"></i>{text}</span>')
    return f'<div class="legend">{"".join(items)}</div>'


def _row(parts: Sequence[BarPart], bar: Bar, span: float, show: Format, line: str) -> str:
    sized = [(part, size) for part, size in zip(parts, bar.sizes, strict=True) if size > 0]
    sizes = ", ".join(f"{part.name} {show(size)}" for part, size in sized)
    about = escape(f"{bar.label}: {sizes}; {show(bar.total)} in all")
    boxes = "".join(
        f'<i class="{part.style}" style="width:{100 * size / span:.3f}%" '
        f'title="{escape(f"{part.name} {show(size)}")}"></i>'
        for part, size in sized
    )
    return (
        f'<span class="name">{escape(bar.label)}</span><div class="bar" role="img" aria-label="{about}">{boxes}{line}'
        f'</div><span class="sum">{escape(show(bar.total))}</span>'
    )
