"""Builds a schedule from the name of its kind within a memory cap, or the best one of all kinds.

Searched schedules are cached on disk. The key covers all inputs and the source files of the search. The choice times
every kind under given costs, and is explained. Schedules that decode have forwards only, and their last stage feeds the
first one with tokens: a cohort of sequences is in one stage at a time, so a pipeline is busy only if several cohorts
travel through it. With two directions, half of them enter at either end. Any placement works.
"""

import contextlib
import hashlib
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from heapq import heappop, heappush
from pathlib import Path
from typing import Any

from base.files import replace_text
from dualpipe.costs import CostModel, Costs, resampled, uniform
from dualpipe.draw.entry import TimedSchedule, UnavailableSchedule, number, time_schedule
from dualpipe.ir import Group, MemoryCapError, Op, Operation, Placement, Schedule, ScheduleError, from_json, to_json
from dualpipe.passes import offload
from dualpipe.registry import FALLBACK, SCHEDULES, ScheduleSpec, candidates, check_size, check_slices
from dualpipe.simulation import activation_cap, makespan_of, peak_memory, simulate
from dualpipe.validate import validate

DECODE_KIND = "decode"
"""`Schedule.kind` of schedules that decode."""
MARGIN = 0.005
"""Fraction of the shortest makespan that `choose` gives up for less memory if the costs count weights."""
_MOST_SEARCHED = 256
"""Maximum of stages times micro-batches for which a run waits for a searched schedule: about 1 s."""


def build_schedule(
    kind: str,
    num_ranks: int,
    num_micro_batches: int,
    costs: CostModel | None = None,
    memory_cap: float | None = None,
    cache_dir: Path | None = None,
) -> Schedule:
    """Builds the named schedule within the memory cap, with offload if the costs allow it.

    Args:
        num_micro_batches: micro-batches of one step, of both directions together.
        costs: costs of each stage; their number determines the chunks; None: equal stages, F = I = W and no exchange.
        memory_cap: maximum of a rank's live activations and its copies of `costs.weights`, in the unit of
            `StageCosts.activation`; None for the schedule's own maximum.

    Raises:
        ScheduleError: if the schedule is not defined for the size or number of chunks, or does not fit the cap.
    """
    check_size(kind, num_ranks, num_micro_batches)
    spec = SCHEDULES.get(kind)
    costs = costs or uniform(Costs(), num_ranks, spec.num_stages(num_ranks))
    chunks, rest = divmod(len(costs.stages), num_ranks)
    assert not rest, f"{kind}: {len(costs.stages)} stages have costs, which {num_ranks} ranks cannot share"
    spec.chunk_choices(chunks)
    check_slices(kind, num_micro_batches, costs.slices)
    copies = len(spec.placement(num_ranks, chunks))
    room = activation_cap(memory_cap, copies, costs)
    activations = replace(costs, weights=0.0)

    def generate(depth: int, cap: float | None) -> Schedule:
        staying = replace(activations.without_offload(), link_depth=depth)
        made = _generate(spec, num_ranks, num_micro_batches, staying, cap, cache_dir)
        # Pictures, reports and errors use the name that was chosen, which may be a former one.
        return replace(made, kind=kind, link_depth=activations.link_depth)

    # Deeper links allow every order of shallower ones, which a search may miss.
    depths = range(1, costs.link_depth + 1) if spec.takes_costs else [costs.link_depth]
    try:
        made = [_fit(partial(generate, depth), activations, room) for depth in depths]
        # One order is not timed, because a plugin's may never end, which the validator explains.
        return min(made, key=lambda schedule: makespan_of(schedule, activations)) if made[1:] else made[0]
    except MemoryCapError as error:
        if not costs.weights:
            raise
        raise MemoryCapError(
            f"{str(error).removeprefix('memory_cap: ')}; both without {copies} x {costs.weights:g} of weights",
            error.least + copies * costs.weights,
        ) from error


def _fit(generate: Callable[[float | None], Schedule], costs: CostModel, memory_cap: float | None) -> Schedule:
    """Makes the schedule within a cap on its activations, with offload if that is allowed and faster."""
    if memory_cap is None or not costs.can_offload:
        return generate(memory_cap)
    try:
        staying: Schedule | None = generate(memory_cap)
    except MemoryCapError:
        staying = None
    moving = offload(generate(None), costs, memory_cap)
    candidates = [schedule for schedule in (staying, moving) if schedule is not None]
    # If neither keeps the cap, the generator's error says which one it could keep without offload.
    return (
        min(candidates, key=lambda schedule: simulate(schedule, costs).makespan) if candidates else generate(memory_cap)
    )


def _generate(
    spec: ScheduleSpec,
    num_ranks: int,
    num_micro_batches: int,
    costs: CostModel,
    memory_cap: float | None,
    cache_dir: Path | None,
) -> Schedule:
    if spec.takes_costs:
        return load_or_make(spec.generate, num_ranks, num_micro_batches, costs, memory_cap, cache_dir)
    schedule = spec.generate(num_ranks, num_micro_batches, *([costs.slices] if spec.takes_slices else []))
    expected = spec.placement(num_ranks, len(costs.stages) // num_ranks)
    if schedule.placement != expected:
        raise ScheduleError(
            f"schedule '{spec.name}': places stages on ranks {schedule.placement}, its entry has {expected}"
        )
    _check_cap(schedule, costs, memory_cap)
    return schedule


def _check_cap(schedule: Schedule, costs: CostModel, memory_cap: float | None) -> None:
    peak = max(peak_memory(schedule, costs))
    if memory_cap is not None and peak > memory_cap + 1e-9:
        raise MemoryCapError(
            f"schedule '{schedule.kind}' on {schedule.num_ranks} ranks keeps {peak:g} live activations on a rank, "
            f"the cap is {memory_cap:g}; nearest: {peak:g}, or schedule={FALLBACK}",
            peak,
        )


Make = Callable[[int, int, CostModel, float | None], Schedule]


def schedules_folder(cache_dir: str) -> Path:
    """Returns the folder of schedules in a cache folder; `~` is expanded."""
    return Path(cache_dir).expanduser() / "schedules"


def load_or_make(
    make: Make,
    num_ranks: int,
    num_micro_batches: int,
    costs: CostModel,
    memory_cap: float | None,
    cache_dir: Path | None,
) -> Schedule:
    """Returns the schedule of `make`, from the cache if possible; a cached schedule is validated."""
    if cache_dir is None:
        return make(num_ranks, num_micro_batches, costs, memory_cap)
    inputs = json.dumps([make.__name__, num_ranks, num_micro_batches, asdict(costs), memory_cap])
    digest = hashlib.sha256((_program_digest(make) + inputs).encode()).hexdigest()[:24]
    path = cache_dir / f"{make.__name__}-{num_ranks}-{num_micro_batches}-{digest}.json"
    cached = _read(path)
    if cached is not None and (cached.num_ranks, cached.num_micro_batches) == (num_ranks, num_micro_batches):
        return cached
    schedule = make(num_ranks, num_micro_batches, costs, memory_cap)
    write_if_possible(path, to_json(schedule))
    return schedule


def _program_digest(make: Make) -> str:
    """Returns a digest of every file of the search, its presets and a plugin's file included."""
    package = Path(__file__).parent
    source = sys.modules[make.__module__].__file__
    files = {*package.rglob("*.py"), *package.rglob("*.json"), *([Path(source)] if source else [])}
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _read(path: Path) -> Schedule | None:
    try:
        schedule = from_json(path.read_text(encoding="utf-8"))
        validate(schedule)
    except (OSError, UnicodeDecodeError, ScheduleError):
        return None
    return schedule


def write_if_possible(path: Path, text: str) -> None:
    """Writes a file of a cache at once, or nothing if its folder cannot be written."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, text)


def decode(placement: Placement, cohorts: int, rounds: int) -> Schedule:
    """Returns the schedule of a number of rounds of every cohort, in the order in which inputs arrive.

    Of several inputs, that of the latest stage is first: its tokens are needed soonest. A round reads prompts, or adds
    tokens to every sequence of the cohort.
    """
    for name, value in (("cohorts", cohorts), ("rounds", rounds)):
        if value < 1:
            raise ScheduleError(f"{name}: a schedule that decodes needs at least 1, has {value}; nearest: 1")
    num_ranks = 1 + max(max(row) for row in placement)
    ranks: list[list[Group]] = [[] for _ in range(num_ranks)]
    ready: list[list[tuple[int, int, int, int]]] = [[] for _ in range(num_ranks)]  # arrival, -stage, direction, m
    for direction, row in enumerate(placement):
        for cohort in range(cohorts):
            heappush(ready[row[0]], (0, 0, direction, cohort))
    time = 0
    while any(ready):
        arrivals: list[tuple[int, tuple[int, int, int, int]]] = []
        for rank, waiting in enumerate(ready):
            if waiting:
                _, stage, direction, micro_batch = heappop(waiting)
                op = Operation(Op.FORWARD, direction, -stage, micro_batch)
                ranks[rank].append((op,))
                arrivals += _next(placement, op, cohorts, rounds, time + 1)
        for rank, arrived in arrivals:
            heappush(ready[rank], arrived)
        time += 1
    return Schedule(
        kind=DECODE_KIND,
        num_ranks=num_ranks,
        num_micro_batches=len(placement) * cohorts * rounds,
        placement=placement,
        ranks=tuple(map(tuple, ranks)),
        cohorts=cohorts,
    )


def _next(
    placement: Placement, op: Operation, cohorts: int, rounds: int, time: int
) -> list[tuple[int, tuple[int, int, int, int]]]:
    row = placement[op.direction]
    stage = op.stage + 1
    micro_batch = op.micro_batch
    if stage == len(row):
        stage = 0
        micro_batch = micro_batch + cohorts
    if micro_batch >= cohorts * rounds:
        return []
    return [(row[stage], (time, -stage, op.direction, micro_batch))]


CostsOf = Callable[[str, int], CostModel]
"""Function from the kind of schedule and the number of stages to the costs of the stages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Chosen schedule, the reason for it, and all schedules that were considered."""

    schedule: Schedule
    reason: str
    rows: tuple[TimedSchedule | UnavailableSchedule, ...]


def survey(
    num_ranks: int,
    num_micro_batches: int,
    costs_of: CostsOf,
    memory_cap: float | None = None,
    cache_dir: Path | None = None,
    excluded: dict[str, str] | None = None,
    *,
    chunks: int | None = None,
    most_stages: int | None = None,
) -> tuple[TimedSchedule | UnavailableSchedule, ...]:
    """Times every kind of schedule that may be chosen, or gives the reason why it is not available."""
    rows: list[TimedSchedule | UnavailableSchedule] = []
    least = math.inf
    for kind in candidates():
        if excluded and kind in excluded:
            rows.append(UnavailableSchedule(kind=kind, reason=excluded[kind]))
            continue
        try:
            rows.append(
                best_of_kind(
                    kind, num_ranks, num_micro_batches, costs_of, memory_cap, cache_dir, chunks, most_stages=most_stages
                )
            )
        except ScheduleError as error:
            if isinstance(error, MemoryCapError):
                least = min(least, error.least)
            rows.append(UnavailableSchedule(kind=kind, reason=str(error)))
    if memory_cap is not None and all(isinstance(row, UnavailableSchedule) for row in rows) and math.isfinite(least):
        raise MemoryCapError(
            f"no schedule of {num_ranks} ranks fits the cap, which is {memory_cap:g}; nearest: {least:g}",
            least,
        )
    return tuple(rows)


def best_of_kind(  # noqa: PLR0913
    kind: str,
    num_ranks: int,
    num_micro_batches: int,
    costs_of: CostsOf,
    memory_cap: float | None = None,
    cache_dir: Path | None = None,
    chunks: int | None = None,
    *,
    most_stages: int | None = None,
    change: Callable[[Schedule], Schedule] | None = None,
) -> TimedSchedule:
    """Times a kind of schedule with each possible number of chunks and returns the shortest.

    If the costs are those of slices and the kind does not take slices, it is timed with whole sequences.

    Args:
        memory_cap: as in `dualpipe.builder.build_schedule`.
        most_stages: maximum number of stages, except for the smallest number of chunks; None for no maximum.
        change: what a run does to the schedule before it is timed.

    Raises:
        ScheduleError: if the kind is not defined for the size or number of chunks, or does not fit the cap.
    """
    spec = SCHEDULES.get(kind)
    timed: list[TimedSchedule] = []
    errors: list[ScheduleError] = []
    for choice in spec.chunk_choices(chunks):
        num_stages = spec.num_stages(num_ranks, choice)
        if (timed or errors) and num_stages > (most_stages or math.inf):
            break
        try:
            costs, count = _as_taken(spec, costs_of(kind, num_stages), num_micro_batches)
            schedule = build_schedule(kind, num_ranks, count, costs, memory_cap, cache_dir)
        except ScheduleError as error:
            errors.append(error)
        else:
            schedule = schedule if change is None else change(schedule)
            timed.append(time_schedule(schedule, costs, memory_cap))
    if not timed:
        raise min(errors, key=lambda error: error.least if isinstance(error, MemoryCapError) else math.inf)
    return min(timed, key=_order)


def _as_taken(spec: ScheduleSpec, costs: CostModel, num_micro_batches: int) -> tuple[CostModel, int]:
    """Returns the costs and number of what a kind runs: of whole sequences if it does not take slices."""
    if spec.takes_slices:
        return costs, num_micro_batches
    return costs.of_whole_sequences(), num_micro_batches // costs.slices


def choose(rows: Sequence[TimedSchedule | UnavailableSchedule], memory_cap: float | None = None) -> Choice:
    """Returns the schedule with the shortest makespan; of equal ones, that with the least memory.

    If the costs count weights, makespans within `MARGIN` of the shortest are equal: two directions hold the weights
    twice.
    """
    entries = [row for row in rows if isinstance(row, TimedSchedule)]
    if not entries:
        reasons = "; ".join(f"{row.kind}: {row.reason}" for row in rows if isinstance(row, UnavailableSchedule))
        raise ScheduleError(f"schedule: no kind is available: {reasons}")
    ranked = sorted(entries, key=_order)
    limit = ranked[0].simulation.makespan * (1 + MARGIN)
    near = [row for row in ranked if row.costs.weights and row.simulation.makespan <= limit] or ranked[:1]
    best = min(near, key=lambda row: (round(row.memory, 9), *_order(row)))
    return Choice(schedule=best.schedule, reason=_reason(best, ranked, memory_cap), rows=tuple(rows))


def _order(row: TimedSchedule) -> tuple[float, float]:
    return round(row.simulation.makespan, 9), row.memory


def _reason(best: TimedSchedule, ranked: Sequence[TimedSchedule], memory_cap: float | None) -> str:
    words = f"{_name(best)}: makespan {number(best.simulation.makespan)}"
    others = [row for row in ranked if row is not best]
    if others:
        words += f", {_compared(best, others[0])}"
    words += f"; it keeps {number(best.peak)} activations of model/P"
    if best.costs.weights:
        words += f" and {best.copies} x {number(best.costs.weights)} of weights, {number(best.memory)} together,"
    words += "" if memory_cap is None else f" of the {memory_cap:g} allowed"
    above = best.above_bound
    words = words.rstrip(",")
    return words + (
        f"; {number(above)} above the lower bound" if above > 1e-9 else "; no schedule with its placement is shorter"
    )


def _compared(best: TimedSchedule, runner_up: TimedSchedule) -> str:
    best_makespan = best.simulation.makespan
    makespan = runner_up.simulation.makespan
    if makespan < best_makespan - 1e-9:
        less = f"{100 * (1 - makespan / best_makespan):.2f} % shorter"
        return f"{_name(runner_up)} is {less} but needs {number(runner_up.memory)} of memory, weights included"
    more = makespan / best_makespan - 1 if best_makespan else 0.0
    words = f"then {_name(runner_up)} with {number(makespan)} ({100 * more:.1f} % more"
    return words + (f", peak {number(runner_up.peak)})" if more < 1e-9 else ")")


def _name(row: TimedSchedule) -> str:
    """Returns the kind, with the number of chunks if it could be another."""
    kind = row.schedule.kind
    has_choice = kind in SCHEDULES and len(SCHEDULES.get(kind).chunks) > 1
    return f"{kind} with {row.chunks} chunk{'s' * (row.chunks != 1)}" if has_choice else kind


class Alternatives:
    """Other schedules of a run's size. Each is made once and timed under the costs of every picture."""

    def __init__(
        self,
        excluded: Mapping[str, str],
        change: Callable[[Schedule], Schedule] | None = None,
        most_stages: int | None = None,
    ) -> None:
        """Stores excluded kinds with reasons; `change` is what the run does to its schedule."""
        self._excluded = excluded
        self._change = change
        self._most_stages = most_stages
        self._built: dict[str, Schedule | UnavailableSchedule] = {}

    def timed(self, schedule: Schedule, costs: CostModel) -> list[TimedSchedule | UnavailableSchedule]:
        """Times every other kind, with its best number of chunks of the first call, or says why it cannot."""
        rows: list[TimedSchedule | UnavailableSchedule] = []
        costs = replace(costs, slices=schedule.slices)
        for kind, spec in candidates().items():
            if kind == SCHEDULES.current_name(schedule.kind):
                continue
            built = self._built.get(kind)
            if built is None:
                built = self._built[kind] = self._make(kind, schedule, costs)
            if isinstance(built, Schedule):
                own_costs, _ = _as_taken(spec, resampled(costs, built.num_stages), 0)
                rows.append(time_schedule(built, own_costs))
            else:
                rows.append(built)
        return rows

    def _make(self, kind: str, schedule: Schedule, costs: CostModel) -> Schedule | UnavailableSchedule:
        if kind in self._excluded:
            return UnavailableSchedule(kind=kind, reason=self._excluded[kind])
        num_ranks = schedule.num_ranks
        num_micro_batches = schedule.num_micro_batches

        def costs_of(kind: str, num_stages: int) -> CostModel:
            if SCHEDULES.get(kind).takes_costs and num_stages * num_micro_batches > _MOST_SEARCHED:
                hint = f"num_ranks={num_ranks} num_micro_batches={num_micro_batches}"
                reason = f"its search takes too long during a run; see python -m launch.schedule {hint}"
                raise ScheduleError(reason)
            return resampled(costs, num_stages)

        limits: dict[str, Any] = {"most_stages": self._most_stages, "change": self._change}
        try:
            return best_of_kind(kind, num_ranks, num_micro_batches, costs_of, **limits).schedule
        except ScheduleError as error:
            return UnavailableSchedule(kind=kind, reason=str(error))


def by_makespan(rows: list[TimedSchedule | UnavailableSchedule]) -> list[TimedSchedule | UnavailableSchedule]:
    """Returns the rows sorted by makespan, unavailable schedules last."""
    timed = [row for row in rows if isinstance(row, TimedSchedule)]
    others = [row for row in rows if isinstance(row, UnavailableSchedule)]
    return [*sorted(timed, key=lambda row: (row.simulation.makespan, row.peak)), *others]
