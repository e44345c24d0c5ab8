"""Line charts as SVG: a number over steps, its least and most where many steps make one point, events as marks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from train.report.figures import plain, step_ticks, ticks
from train.report.history import Bucket, History, Tally

_LEFT, _RIGHT, _TOP, _BOTTOM = 66.0, 14.0, 34.0, 26.0
_LETTER = 6.6
_FEW = 60  # points that are drawn as dots too


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A number of the history and how it is called; `colour` is the number of its style."""

    key: str
    name: str
    colour: int
    dots: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """Something that happened at a step. `kind` is a style: `checkpoint`, or anything else for an event."""

    step: int
    kind: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """The area that points are placed in: steps to the right, values up."""

    width: float
    height: float
    steps: tuple[float, float]
    values: tuple[float, float]

    def x(self, step: float) -> float:
        """Of a step; the middle where there is one only."""
        first, last = self.steps
        share = (step - first) / (last - first) if last > first else 0.5
        return _LEFT + share * (self.width - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        """Of a value."""
        low, high = self.values
        return self.height - _BOTTOM - (value - low) / (high - low) * (self.height - _TOP - _BOTTOM)


def chart(
    history: History,
    title: str,
    lines: Sequence[Line],
    *,
    tell: Callable[[float], str] = plain,
    marks: Sequence[Mark] = (),
    from_zero: bool = False,
    size: tuple[float, float] = (560.0, 230.0),
) -> str:
    """One `<figure>` with lines for the numbers that the history knows; empty text where it knows none.

    Args:
        history: of the run.
        title: above the lines.
        lines: in the order of the legend.
        tell: a value as text.
        marks: of steps, drawn from top to bottom.
        from_zero: whether values begin at 0, or near the least.
        size: in pixels.
    """
    known = [(line, points) for line in lines if (points := history.tallies(line.key))]
    if not known:
        return ""
    values = [value for _, points in known for _, tally in points for value in (tally.least, tally.most)]
    scale = ticks(0.0 if from_zero else min(values), max(values), 4)
    steps = (history.buckets[0].first, history.buckets[-1].last)
    frame = Frame(width=size[0], height=size[1], steps=steps, values=(scale[0], scale[-1]))
    parts = [*_axes(frame, scale, tell), *(_mark(frame, mark) for mark in marks)]
    for line, points in known:
        parts += _drawn(frame, line, points)
    parts += _readings(frame, history, known, tell, marks)
    parts += [f'<text class="title" x="12" y="20">{escape(title)}</text>']
    if len(known) > 1:
        parts += _legend(frame, [line for line, _ in known], 12 + 8.4 * len(title) + 30)
    return f"<figure>{element(size[0], size[1], title, parts)}</figure>"


def element(width: float, height: float, name: str, parts: Sequence[str]) -> str:
    """An `<svg>` of that natural size that shrinks with the page."""
    box = f'viewBox="0 0 {width:.0f} {height:.0f}" style="max-width:{width:.0f}px"'
    return f'<svg class="chart" {box} role="img" aria-label="{escape(name)}">\n' + "\n".join(parts) + "\n</svg>"


def _axes(frame: Frame, scale: Sequence[float], tell: Callable[[float], str]) -> list[str]:
    parts = []
    for value in scale:
        y, right = frame.y(value), frame.width - _RIGHT
        parts.append(f'<line class="grid" x1="{_LEFT:g}" x2="{right:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="soft end" x="{_LEFT - 7:g}" y="{y + 4:.1f}">{escape(tell(value))}</text>')
    first, last = frame.steps
    return parts + step_axis(frame, frame.height - 8, (int(first), int(last)))


def step_axis(frame: Frame, y: float, steps: tuple[int, int]) -> list[str]:
    """Numbers of steps, from the first to the last, at a height."""
    return [
        f'<text class="soft middle" x="{frame.x(step):.1f}" y="{y:g}">{step:,}</text>' for step in step_ticks(*steps)
    ]


def _mark(frame: Frame, mark: Mark) -> str:
    kind = "checkpoint" if mark.kind == "checkpoint" else "event"
    x = frame.x(min(max(mark.step, frame.steps[0]), frame.steps[1]))
    top = frame.height - _BOTTOM - 7 if kind == "checkpoint" else _TOP
    return f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{top:g}" y2="{frame.height - _BOTTOM:g}"/>'


def _drawn(frame: Frame, line: Line, points: Sequence[tuple[Bucket, Tally]]) -> list[str]:
    places = [(frame.x((bucket.first + bucket.last) / 2), tally) for bucket, tally in points]
    parts = []
    if any(tally.count > 1 for _, tally in points):
        above = [f"{x:.1f},{frame.y(tally.most):.1f}" for x, tally in places]
        below = [f"{x:.1f},{frame.y(tally.least):.1f}" for x, tally in reversed(places)]
        parts.append(f'<polygon class="band colour-{line.colour}" points="{" ".join(above + below)}"/>')
    centre = [(x, frame.y(tally.mean)) for x, tally in places]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in centre)
    parts.append(f'<polyline class="line colour-{line.colour}" points="{path}"/>')
    if line.dots or len(points) == 1:
        few = centre if len(centre) <= _FEW else []
        parts += [f'<circle class="dot colour-{line.colour}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in few]
    return parts


def _readings(
    frame: Frame,
    history: History,
    known: Sequence[tuple[Line, Sequence[tuple[Bucket, Tally]]]],
    tell: Callable[[float], str],
    marks: Sequence[Mark],
) -> list[str]:
    """A strip for each bucket that names its values where one points."""
    width = (frame.width - _LEFT - _RIGHT) / max(len(history.buckets), 1)
    parts = []
    for bucket in history.buckets:
        told = [f"{line.name} {tell(bucket.tallies[line.key].mean)}" for line, _ in known if line.key in bucket.tallies]
        told += [mark.kind for mark in marks if bucket.first <= mark.step <= bucket.last]
        if told:
            steps = f"step {bucket.first:,}" + (f" to {bucket.last:,}, mean" if bucket.last > bucket.first else "")
            x = frame.x((bucket.first + bucket.last) / 2) - width / 2
            parts.append(
                f'<rect class="reading" x="{x:.1f}" y="{_TOP:g}" width="{width:.1f}" '
                f'height="{frame.height - _TOP - _BOTTOM:g}"><title>{escape(steps)}: {escape(", ".join(told))}</title>'
                "</rect>"
            )
    return parts


def _legend(frame: Frame, lines: Sequence[Line], x: float) -> list[str]:
    parts = []
    for line in lines:
        parts.append(f'<line class="line colour-{line.colour}" x1="{x:g}" x2="{x + 18:g}" y1="16" y2="16"/>')
        parts.append(f'<text class="soft" x="{x + 23:g}" y="20">{escape(line.name)}</text>')
        x += 23 + _LETTER * len(line.name) + 18
    return parts
