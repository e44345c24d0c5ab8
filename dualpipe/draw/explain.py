"""Explains where a schedule loses time: its steady state, both ends, and the next best schedules."""

from collections.abc import Sequence
from html import escape

from dualpipe.draw.entry import Pace, RankPace, TimedSchedule, needs_stage_label, number, percent
from dualpipe.ir import Group, Schedule

_PARTS = ("head", "steady state", "tail")
_NUM_OTHERS = 3


def steady_lines(steady: Pace) -> tuple[str, str]:
    """Returns what the steady state takes and what limits it, and where the busiest rank loses time."""
    rank = steady.ranks[steady.busiest]
    losses = ", ".join(f"{name} {number(lost)}" for name, lost in zip(_PARTS, rank.losses, strict=True))
    return (
        f"{number(rank.length)} per micro-batch for {number(rank.work)} of computation on rank {steady.busiest}; "
        f"limited by {steady.limit}",
        f"{losses}; time in which rank {steady.busiest} computes nothing",
    )


def explanation(shown: Sequence[TimedSchedule]) -> str:
    """Returns the section of the page on the schedule that was run, or on the first one."""
    if not shown:
        return ""
    entry = next((each for each in shown if each.measured is not None), shown[0])
    heading = f"<h2>Where {escape(entry.schedule.kind)} loses time</h2>"
    others = sorted((each for each in shown if each is not entry), key=lambda each: each.simulation.makespan)
    return "\n".join([heading, _steady(entry), _next_best(entry, others[:_NUM_OTHERS])])


def _steady(entry: TimedSchedule) -> str:
    steady = entry.steady_state
    if steady is None:
        return "<p>There are too few micro-batches for a steady state.</p>"
    length, lost = steady_lines(steady)
    head = ("rank", "length", "work", "computes", "exchanges", "waits", *(f"lost in {part}" for part in _PARTS))
    cells = "".join(f'<th scope="col">{name}</th>' for name in (*head, "groups that repeat"))
    rows = "\n".join(_row(entry.schedule, rank, state) for rank, state in enumerate(steady.ranks))
    return (
        f"<p>Steady state from {number(steady.start)} to {number(steady.end)}: {escape(length)}.</p>\n"
        f"<p>Lost: {escape(lost)}.</p>\n"
        f'<div class="table" tabindex="0" role="region" aria-label="steady state, scrolls"><table>'
        f"<thead><tr>{cells}</tr></thead><tbody>\n{rows}\n</tbody></table></div>\n"
        "<p>length, work: time and computation per micro-batch; computes, exchanges, waits: share of the middle half "
        "of the steady state; lost: time in which the rank computes nothing</p>"
    )


def _row(schedule: Schedule, rank: int, state: RankPace) -> str:
    values = [str(rank), number(state.length), number(state.work)]
    values += [percent(share) for share in (state.computing, state.exchanging, state.waiting)]
    values += [number(lost) for lost in state.losses]
    pattern = " ".join(_label(schedule, rank, group) for group in state.groups) or "none"
    cells = "".join(f"<td>{value}</td>" for value in values)
    return f'<tr>{cells}<td class="pattern">{escape(pattern)}</td></tr>'


def _label(schedule: Schedule, rank: int, group: Group) -> str:
    """Returns the kinds of a group, with the stage if the rank has several; direction 1 in small letters."""
    parts = []
    for op in group:
        stage = str(op.stage) if needs_stage_label(schedule, rank, op.direction) else ""
        parts.append((op.kind.value.lower() if op.direction else op.kind.value) + stage)
    return "+".join(parts)


def _next_best(entry: TimedSchedule, others: Sequence[TimedSchedule]) -> str:
    if not others:
        return ""
    items = "\n".join(f"<li>{escape(_difference(entry, other))}</li>" for other in others)
    return f"<p>The next best schedules under the same costs:</p>\n<ol>\n{items}\n</ol>"


def _difference(entry: TimedSchedule, other: TimedSchedule) -> str:
    """Returns how much longer another schedule is, and in which part most of the difference arises."""
    mine = entry.simulation.makespan
    its = other.simulation.makespan
    change = its / mine - 1 if mine else 0.0
    words = "as long" if abs(change) < 5e-4 else f"{percent(abs(change))} {'longer' if change > 0 else 'shorter'}"
    text = f"{other.schedule.kind} with {other.chunks} chunk{'s' * (other.chunks != 1)}: {words}"
    text += f", peak {number(other.peak)}, weights {other.copies}x"
    before = entry.steady_state
    after = other.steady_state
    if before is None or after is None or abs(change) < 5e-4:
        return text
    pairs = zip(before.ranks[before.busiest].losses, after.ranks[after.busiest].losses, strict=True)
    differences = dict(zip(_PARTS, (one - other for other, one in pairs), strict=True))
    part = max(differences, key=lambda name: differences[name] * (1 if change > 0 else -1))
    verb = "more" if differences[part] > 0 else "less"
    return f"{text}; it loses {number(abs(differences[part]))} {verb} in its {part}, limited by {after.limit}"
