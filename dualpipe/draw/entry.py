"""Defines the data of one schedule that pictures show, its steady state, and where it loses time.

The steady state lasts from the first backward of the last rank to begin one, to the last forward of the first rank to
end its forwards. The rest are head and tail.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import pairwise

from base.figures import Html, table
from dualpipe.bounds import Bound, lower_bound
from dualpipe.costs import CostModel, Costs, uniform
from dualpipe.ir import Group, Op, Schedule
from dualpipe.runtime.measured import Measured
from dualpipe.simulation import Simulation, activation_cap, simulate

_NEAR = 0.01
_GRADIENTS = (Op.BACKWARD, Op.BACKWARD_INPUT)
_PARTS = ("head", "steady state", "tail")
_NUM_OTHERS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPace:
    """Use of one rank in the steady state, per micro-batch or as fractions of its middle half.

    `groups` is the shortest sequence that repeats, by kind, direction and stage; `losses` are times without computation
    in head, steady state and tail.
    """

    groups: tuple[Group, ...]
    work: float
    length: float
    computing: float
    exchanging: float
    waiting: float
    losses: tuple[float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Steady state of a schedule. `busiest` is the first of the ranks with most computation."""

    start: float
    end: float
    limit: str
    ranks: tuple[RankPace, ...]
    busiest: int


def pace_of(
    schedule: Schedule, costs: CostModel, simulation: Simulation, memory_cap: float | None = None
) -> Pace | None:
    """Returns the steady state of a valid training schedule, or None with too few micro-batches."""
    window = _window(schedule, simulation)
    if window is None:
        return None
    ranks = tuple(_rank_state(schedule, costs, simulation, rank, window) for rank in range(schedule.num_ranks))
    busiest = max(range(len(ranks)), key=lambda rank: (round(ranks[rank].work, 9), -rank))
    limit = _limit(schedule, costs, ranks, busiest)
    room = activation_cap(memory_cap, schedule.num_directions, costs)
    smallest = min(stage.activation for stage in costs.stages)
    if limit.startswith("dependencies") and room is not None and max(simulation.peaks) + smallest > room + 1e-9:
        limit = f"the memory cap: {max(simulation.peaks):.4g} of {room:.4g} activations are alive, and "
        limit += f"rank {busiest} waits {100 * ranks[busiest].waiting:.3g} % of the time"
    return Pace(start=window[0], end=window[1], limit=limit, ranks=ranks, busiest=busiest)


def _window(schedule: Schedule, simulation: Simulation) -> tuple[float, float] | None:
    start = 0.0
    end = simulation.makespan
    for rank, groups in enumerate(schedule.ranks):
        backwards = [index for index, group in enumerate(groups) if any(op.kind in _GRADIENTS for op in group)]
        forwards = [index for index, group in enumerate(groups) if any(op.kind is Op.FORWARD for op in group)]
        if not backwards or not forwards:
            return None
        start = max(start, simulation.starts[rank][backwards[0]])
        end = min(end, simulation.ends[rank][forwards[-1]])
    return (start, end) if end > start else None


def _rank_state(
    schedule: Schedule, costs: CostModel, simulation: Simulation, rank: int, window: tuple[float, float]
) -> RankPace:
    start, end = window
    groups = schedule.ranks[rank]

    def inside(time: Callable[[Group], float], low: float, high: float) -> float:
        """Returns the time of the groups' parts between two times, spread evenly over each group."""
        total = 0.0
        for group, begin, stop in zip(groups, simulation.starts[rank], simulation.ends[rank], strict=True):
            shared = min(stop, high) - max(begin, low)
            if shared > 0:
                total += time(group) * shared / (stop - begin)
        return total

    def compute(group: Group) -> float:
        return sum(map(costs.compute_of, group))

    # Ranks reach their full pace some groups after the begin, so the middle half shows it.
    first = start + (end - start) / 4
    last = end - (end - start) / 4
    span = last - first
    busy = inside(costs.duration_of, first, last)
    computing = inside(compute, first, last)
    work = sum(map(compute, groups)) / schedule.num_micro_batches
    bounds = (0.0, start, end, simulation.makespan)
    losses = tuple(high - low - inside(compute, low, high) for low, high in pairwise(bounds))
    return RankPace(
        groups=_repeated(schedule, simulation, rank, window),
        work=work,
        length=work * span / computing if computing else 0.0,
        computing=computing / span,
        exchanging=inside(lambda group: sum(map(costs.exchange_of, group)), first, last) / span,
        waiting=1 - busy / span,
        losses=(losses[0], losses[1], losses[2]),
    )


def _repeated(schedule: Schedule, simulation: Simulation, rank: int, window: tuple[float, float]) -> tuple[Group, ...]:
    spans = zip(schedule.ranks[rank], simulation.starts[rank], simulation.ends[rank], strict=True)
    groups = [group for group, begin, stop in spans if begin >= window[0] and stop <= window[1]]
    # The first groups after the head and the last ones before the tail may still differ.
    groups = groups[len(groups) // 4 : len(groups) - len(groups) // 4]
    signatures = [sorted((op.kind, op.direction, op.stage) for op in group) for group in groups]
    for period in range(1, len(groups) // 2 + 1):
        if signatures[period:] == signatures[:-period]:
            return tuple(groups[:period])
    return ()


def _limit(schedule: Schedule, costs: CostModel, ranks: tuple[RankPace, ...], busiest: int) -> str:
    rank = ranks[busiest]
    if rank.computing >= 1 - _NEAR:
        return f"computation: rank {busiest} computes {100 * rank.computing:.3g} % of the time"
    fullest = max(range(len(ranks)), key=lambda index: ranks[index].exchanging)
    if ranks[fullest].exchanging >= 1 - _NEAR:
        return f"exchange: rank {fullest} exchanges {100 * ranks[fullest].exchanging:.3g} % of the time"
    without = {
        "latency: without it,": replace(costs, latency=0.0),
        "exchange that groups do not hide: without it,": replace(
            costs,
            stages=tuple(replace(stage, forward_exchange=0.0, backward_exchange=0.0) for stage in costs.stages),
            by_slice=(),
        ),
    }
    lengths = {}
    for words, changed in without.items():
        simulation = simulate(schedule, changed)
        window = _window(schedule, simulation)
        if window is not None:
            lengths[words] = _rank_state(schedule, changed, simulation, busiest, window).length
    words, length = min(lengths.items(), key=lambda item: item[1], default=("", rank.length))
    if length < rank.length * (1 - _NEAR):
        return f"{words} this order would take {length:.3g} per micro-batch"
    return f"dependencies: rank {busiest} waits {100 * rank.waiting:.3g} % of the time for other ranks"


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedSchedule:
    """Schedule with its timing and lower bound. If it was run, the costs are in seconds and it has spans."""

    schedule: Schedule
    costs: CostModel
    simulation: Simulation
    bound: Bound
    measured: Measured | None = None
    memory_cap: float | None = None

    @property
    def steady_state(self) -> Pace | None:
        """What repeats and what limits it, or None if there are too few micro-batches."""
        return pace_of(self.schedule, self.costs, self.simulation, self.memory_cap)

    @property
    def work(self) -> float:
        """Computation of the rank with the most computation."""
        ranks = self.schedule.ranks
        return max(
            (sum(self.costs.compute_of(op) for group in groups for op in group) for groups in ranks), default=0.0
        )

    @property
    def overhead(self) -> float:
        """Makespan minus `work`."""
        return self.simulation.makespan - self.work

    @property
    def exposed(self) -> float:
        """Exposed exchange of the rank with the most exposed exchange."""
        return max(self.simulation.exposed, default=0.0)

    @property
    def peak(self) -> float:
        """Largest peak of live activations of a rank; of model/P if the costs come from `costs.uniform`."""
        return max(self.simulation.peaks, default=0.0)

    @property
    def chunks(self) -> int:
        """Stages of a rank for one direction."""
        return self.schedule.num_stages // self.schedule.num_ranks

    @property
    def copies(self) -> int:
        """Number of times that the pipeline holds the model's weights: once for each direction."""
        return self.schedule.num_directions

    @property
    def memory(self) -> float:
        """Peak of live activations plus the copies of the weights, if the costs count weights."""
        return self.peak + self.copies * self.costs.weights

    @property
    def above_bound(self) -> float:
        """Makespan minus the lower bound."""
        return self.simulation.makespan - self.bound.value


@dataclass(frozen=True, slots=True, kw_only=True)
class UnavailableSchedule:
    """Kind of schedule that is not available, and the reason, as in `needs an even number of ranks`."""

    kind: str
    reason: str


def kind_of(row: TimedSchedule | UnavailableSchedule) -> str:
    """Returns the kind of a schedule, available or not."""
    return row.schedule.kind if isinstance(row, TimedSchedule) else row.kind


def time_schedule(
    schedule: Schedule, costs: Costs | CostModel, memory_cap: float | None = None, measured: Measured | None = None
) -> TimedSchedule:
    """Simulates a valid schedule and computes its lower bound, in seconds if there was a run.

    Raises:
        ScheduleError: if ranks deadlock, or no schedule fits the cap.
    """
    model = uniform(costs, schedule.num_ranks, schedule.num_stages) if isinstance(costs, Costs) else costs
    return TimedSchedule(
        schedule=schedule,
        costs=model,
        simulation=simulate(schedule, model),
        bound=lower_bound(schedule, model, memory_cap),
        measured=measured,
        memory_cap=memory_cap,
    )


NAMES = {
    Op.FORWARD: "forward",
    Op.BACKWARD: "backward",
    Op.BACKWARD_INPUT: "backward for inputs",
    Op.BACKWARD_WEIGHT: "backward for weights",
    Op.OFFLOAD: "offload",
    Op.RELOAD: "reload",
}


def number(value: float) -> str:
    """Formats a number with at most three significant digits, as in `24.6`; about zero is 0."""
    rounded = 0.0 if abs(value) < 1e-9 else float(f"{value:.3g}")
    return f"{rounded:.10g}"


def tick_text(value: float) -> str:
    """Formats a round time for an axis."""
    return f"{value:.6g}"


def spread(values: tuple[float, ...]) -> str:
    """Formats the value if all are equal, else the minimum and the maximum."""
    numbers = list(dict.fromkeys(number(value) for value in sorted(values)))
    return numbers[0] if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def percent(fraction: float) -> str:
    """Formats a fraction as a percentage with three significant digits, as in `9.09 %`."""
    return f"{number(100 * fraction)} %"


def round_up(value: float) -> float:
    """Rounds up to the next 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= value * (1 - 1e-9))


def plain(text: str) -> str:
    """Escapes text to ASCII, for terminals and pipes of any encoding."""
    return text.encode("ascii", "backslashreplace").decode()


def needs_stage_label(schedule: Schedule, rank: int, direction: int) -> bool:
    """Returns whether a label needs the stage because the rank holds several for the direction."""
    return [stage_direction for stage_direction, _ in schedule.stages_of(rank)].count(direction) > 1


def size(schedule: Schedule) -> str:
    """Formats the size, as in `8 ranks, 20 micro-batches`."""
    ranks = schedule.num_ranks
    batches = schedule.num_micro_batches
    return f"{ranks} rank{'s' * (ranks != 1)}, {batches} micro-batch{'es' * (batches != 1)}"


def steady_lines(steady: Pace) -> tuple[str, str]:
    """Returns what the steady state takes and what limits it, and where the busiest rank loses time."""
    rank = steady.ranks[steady.busiest]
    losses = ", ".join(f"{name} {number(lost)}" for name, lost in zip(_PARTS, rank.losses, strict=True))
    return (
        f"{number(rank.length)} per micro-batch for {number(rank.work)} of computation on rank {steady.busiest}; "
        f"limited by {steady.limit}",
        f"{losses}; time in which rank {steady.busiest} computes nothing",
    )


def explanation(entries: Sequence[TimedSchedule]) -> str:
    """Returns the section of the page on the schedule that was run, or on the first one."""
    if not entries:
        return ""
    entry = next((candidate for candidate in entries if candidate.measured is not None), entries[0])
    heading = f"<h2>Where {escape(entry.schedule.kind)} loses time</h2>"
    others = sorted(
        (candidate for candidate in entries if candidate is not entry),
        key=lambda candidate: candidate.simulation.makespan,
    )
    return "\n".join([heading, _steady(entry), _next_best(entry, others[:_NUM_OTHERS])])


def _steady(entry: TimedSchedule) -> str:
    steady = entry.steady_state
    if steady is None:
        return "<p>There are too few micro-batches for a steady state.</p>"
    length, lost = steady_lines(steady)
    head = ("rank", "length", "work", "computes", "exchanges", "waits", *(f"lost in {part}" for part in _PARTS))
    rows = [_row(entry.schedule, rank, state) for rank, state in enumerate(steady.ranks)]
    return (
        f"<p>Steady state from {number(steady.start)} to {number(steady.end)}: {escape(length)}.</p>\n"
        f"<p>Lost: {escape(lost)}.</p>\n"
        f"{table((*head, 'groups that repeat'), rows, label='steady state, scrolls')}\n"
        "<p>length, work: time and computation per micro-batch; computes, exchanges, waits: share of the middle half "
        "of the steady state; lost: time in which the rank computes nothing</p>"
    )


def _row(schedule: Schedule, rank: int, state: RankPace) -> list[str]:
    values = [str(rank), number(state.length), number(state.work)]
    values += [percent(share) for share in (state.computing, state.exchanging, state.waiting)]
    values += [number(lost) for lost in state.losses]
    pattern = " ".join(_label(schedule, rank, group) for group in state.groups) or "none"
    return [*values, Html(f'<div class="pattern">{escape(pattern)}</div>')]


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
    items = "\n".join(f"<li>{escape(_difference(entry, alternative))}</li>" for alternative in others)
    return f"<p>The next best schedules under the same costs:</p>\n<ol>\n{items}\n</ol>"


def _difference(entry: TimedSchedule, alternative: TimedSchedule) -> str:
    """Returns how much longer another schedule is, and in which part most of the difference arises."""
    makespan = entry.simulation.makespan
    other_makespan = alternative.simulation.makespan
    change = other_makespan / makespan - 1 if makespan else 0.0
    words = "as long" if abs(change) < 5e-4 else f"{percent(abs(change))} {'longer' if change > 0 else 'shorter'}"
    text = f"{alternative.schedule.kind} with {alternative.chunks} chunk{'s' * (alternative.chunks != 1)}: {words}"
    text += f", peak {number(alternative.peak)}, weights {alternative.copies}x"
    before = entry.steady_state
    after = alternative.steady_state
    if before is None or after is None or abs(change) < 5e-4:
        return text
    pairs = zip(before.ranks[before.busiest].losses, after.ranks[after.busiest].losses, strict=True)
    differences = dict(zip(_PARTS, (loss_after - loss_before for loss_before, loss_after in pairs), strict=True))
    part = max(differences, key=lambda name: differences[name] * (1 if change > 0 else -1))
    verb = "more" if differences[part] > 0 else "less"
    return f"{text}; it loses {number(abs(differences[part]))} {verb} in its {part}, limited by {after.limit}"
