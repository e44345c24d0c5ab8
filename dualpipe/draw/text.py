"""Draws a schedule's timing as plain text, one row per rank, and compares schedules in text and HTML."""

import math
import textwrap
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

from base.figures import aligned
from dualpipe.bounds import lower_bound
from dualpipe.costs import CostModel, Costs, uniform
from dualpipe.draw.entry import (
    NAMES,
    TimedSchedule,
    UnavailableSchedule,
    explanation,
    kind_of,
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
from dualpipe.draw.style import DEFINITIONS, STYLE, document
from dualpipe.draw.svg import Scale, natural_scale, svg
from dualpipe.ir import Group, Op, Schedule
from dualpipe.registry import SCHEDULES
from dualpipe.simulation import Simulation

_MAX_COLUMNS_PER_GROUP = 12
_TICK_COLUMNS = 12
COLUMNS = ("schedule", "chunks", "overhead", "makespan", "bubble %", "exposed", "peak", "weights", "bound", "above")
MEANING = (
    "chunks: stages of a rank for one direction; overhead: makespan - pure computation of the busiest rank; bubble: "
    "idle part of all ranks' time; exposed: exchange that nothing hides; peak: live activations, of model/P; weights: "
    "copies of the model that the pipeline holds; bound: lower bound of any schedule with this placement; above: "
    "makespan - bound"
)
_MEANING_OF_RUN = (
    "; times in seconds, simulated with the times that each stage's operations took in the run; for another number of "
    "stages the same model is split differently"
)
_COLUMN_GAP = "  "


def grid(schedule: Schedule, simulation: Simulation, width: int = 160, *, is_cut: bool = False) -> str:
    """Returns the picture with its legend. ASCII only, no trailing newline.

    A group is a label, followed by dashes up to its end: `F3`, or `F8+b0` for an overlapped pair. A picture wider than
    `width` columns is continued below, or cut there.
    """
    scale = _scale(schedule, simulation)
    margin = len(_head(schedule.num_ranks - 1))
    rows = [_row(schedule, simulation, rank, scale) for rank in range(schedule.num_ranks)]
    total = max(map(len, rows))
    band = max(width - margin, _TICK_COLUMNS)
    lines: list[str] = []
    drawn = min(total, band) if is_cut else total
    for start in range(0, max(drawn, 1), band):
        lines.append("time".ljust(margin) + _ruler(scale, start, min(start + band, total)))
        lines += [(_head(rank).rjust(margin) + row[start : start + band]).rstrip() for rank, row in enumerate(rows)]
        lines.append("")
    if drawn < total:
        span = f"the first {number(drawn / scale)} of {number(simulation.makespan)}"
        lines += textwrap.wrap(f"{span}; out=FILE writes all, format=html or svg draws it", width)
    legend = [line for text in _legend(schedule) for line in (textwrap.wrap(text, width) if is_cut else [text])]
    return "\n".join(lines + legend)


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
    bound_at_peak = lower_bound(schedule, model, own_cap)
    if bound_at_peak.value > bound.value:
        lines.append(("bound at its peak", f"{number(bound_at_peak.value)}; {bound_at_peak.reason}"))
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
    for index in range(math.ceil(start / scale / step), math.floor(stop / scale / step) + 1):
        column = round(index * step * scale) - start
        text = tick_text(index * step)
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


def cells(entry: TimedSchedule) -> tuple[str, ...]:
    """Returns the text of a schedule for each of `COLUMNS`."""
    strings = dict(zip(COLUMNS[1:], map(number, _values(entry)), strict=True))
    return (entry.schedule.kind, *(strings | {"weights": f"{entry.copies}x"}).values())


def _values(entry: TimedSchedule) -> tuple[float, ...]:
    return (
        entry.chunks,
        entry.overhead,
        entry.simulation.makespan,
        100 * entry.simulation.bubble_fraction,
        entry.exposed,
        entry.peak,
        entry.copies,
        entry.bound.value,
        entry.above_bound,
    )


def table(rows: Sequence[TimedSchedule | UnavailableSchedule], width: int = 100) -> str:
    """Returns one ASCII line per schedule, with numbers or a reason, and the meaning of the columns."""
    kind_width = max(map(len, (COLUMNS[0], *map(kind_of, rows))))
    blank = [""] * (len(COLUMNS) - 1)
    strings = [cells(row) if isinstance(row, TimedSchedule) else [row.kind, *blank] for row in rows]
    header, *aligned_rows = aligned([COLUMNS, *strings], text=(0,), gap=_COLUMN_GAP)
    lines = [header]
    for row, line in zip(rows, aligned_rows, strict=True):
        if isinstance(row, UnavailableSchedule):
            lines += _wrapped(f"- {row.reason}", row.kind.ljust(kind_width) + _COLUMN_GAP, width)
        else:
            lines.append(line)
    return plain("\n".join([*lines, "", *textwrap.wrap(MEANING, width)]))


def _wrapped(text: str, head: str, width: int) -> list[str]:
    return textwrap.wrap(
        text, max(width, len(head) + 20), initial_indent=head, subsequent_indent=" " * len(head) + "  "
    )


_TEMPLATE, _STYLE, _SCRIPT = (Path(__file__).with_name(f"page.{kind}") for kind in ("html", "css", "js"))


def html(entries: Sequence[TimedSchedule | UnavailableSchedule], title: str = "Pipeline schedules") -> str:
    """Returns the page, which works offline. If a schedule was run, the others are compared with it."""
    timed = [entry for entry in entries if isinstance(entry, TimedSchedule)]
    scale = _common_scale(timed)
    is_run = any(entry.measured for entry in timed)
    body = Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(title),
        definitions=DEFINITIONS,
        header="".join(_head_cell(name, is_sorted=is_run and name == "makespan") for name in COLUMNS),
        rows="\n".join(_table_row(index, entry, has_run=is_run) for index, entry in enumerate(entries)),
        explanation=explanation(timed),
        meaning=escape(MEANING + (_MEANING_OF_RUN if is_run else "")),
        comparison=_comparison(timed),
        figures="\n".join(_figure(index, entry, scale, has_run=is_run) for index, entry in _run_first(entries)),
    )
    return document(title, body, STYLE + _STYLE.read_text(encoding="utf-8"), _SCRIPT.read_text(encoding="utf-8"))


def _common_scale(entries: Sequence[TimedSchedule]) -> Scale:
    scales = [natural_scale(entry.schedule, entry.simulation, entry.measured) for entry in entries]
    pixels = max((scale.pixels for scale in scales), default=0.0)
    return Scale.within_limits(pixels=pixels, span=max((scale.span for scale in scales), default=0.0))


def _head_cell(name: str, *, is_sorted: bool) -> str:
    order = ' aria-sort="ascending"' if is_sorted else ""
    return f'<th scope="col"{order}><button type="button">{escape(name)}</button></th>'


def _run_first(entries: Sequence[TimedSchedule | UnavailableSchedule]) -> list[tuple[int, TimedSchedule]]:
    """Returns the drawn schedules with their indices in the table; the one that was run comes first."""
    drawn = [(index, entry) for index, entry in enumerate(entries) if isinstance(entry, TimedSchedule)]
    return sorted(drawn, key=lambda each: each[1].measured is None)


def _comparison(entries: Sequence[TimedSchedule]) -> str:
    """Returns a sentence on the schedule that was run and the shortest other one; empty if none was run."""
    run = next((entry for entry in entries if entry.measured is not None), None)
    others = [entry for entry in entries if entry is not run]
    if run is None or not others:
        return ""
    best = min(others, key=lambda entry: entry.simulation.makespan)
    planned = run.simulation.makespan
    change = best.simulation.makespan / planned - 1 if planned else 0.0
    words = "as long" if abs(change) < 5e-4 else f"{percent(abs(change))} {'longer' if change > 0 else 'shorter'}"
    return (
        f"<p>This run uses {escape(run.schedule.kind)}. Under the same costs, the shortest other schedule is "
        f"{escape(best.schedule.kind)}: its makespan is {words}.</p>"
    )


def _table_row(index: int, entry: TimedSchedule | UnavailableSchedule, *, has_run: bool) -> str:
    if isinstance(entry, UnavailableSchedule):
        reason = f'<td class="reason" colspan="{len(COLUMNS) - 1}">{escape(entry.reason)}</td>'
        return f'<tr class="absent"><td>{escape(entry.kind)}</td>{reason}</tr>'
    name, *strings = cells(entry)
    is_run = entry.measured is not None
    checked = "" if has_run and not is_run else " checked"
    label = f"{escape(name)}{' (this run)' if is_run else ''}"
    box = f'<label><input type="checkbox"{checked} data-figure="{_identity(index)}"> {label}</label>'
    numbers = zip(strings, _values(entry), strict=True)
    values = "".join(f'<td data-value="{value:.17g}">{text}</td>' for text, value in numbers)
    return f'<tr class="shown{" run" if is_run else ""}"><td>{box}</td>{values}</tr>'


def _figure(index: int, entry: TimedSchedule, scale: Scale, *, has_run: bool) -> str:
    picture = svg(entry.schedule, entry.simulation, entry.measured, bound=entry.bound, scale=scale, standalone=False)
    name = escape(f"timeline of {entry.schedule.kind}, scrolls")
    hidden = " hidden" if has_run and entry.measured is None else ""
    return f'<figure id="{_identity(index)}" tabindex="0" role="region" aria-label="{name}"{hidden}>{picture}</figure>'


def _identity(index: int) -> str:
    return f"schedule-{index}"
