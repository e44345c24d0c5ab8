"""Finds the best order for given costs and memory cap, known or made by a list builder, by simulation.

A larger memory cap never gives a longer schedule. Orders are built for a fixed series of caps, and the best one within
the given cap is kept, so the orders of a smaller cap are a subset of those of a larger one. Orders of few micro-batches
are extended to many by repeating their steady state.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import lcm

from dualpipe.bounds import lower_bound
from dualpipe.costs import CostModel
from dualpipe.generate.list_builder import build_order
from dualpipe.generate.list_pipeline import PRESETS, SLICED_PRESETS, Pipeline, Preset, default_block
from dualpipe.ir import Group, MemoryCapError, Op, Operation, Schedule, ScheduleError
from dualpipe.simulation import Simulation, makespan_of, peak_memory, simulate
from dualpipe.validate import validate

# Maximum number of groups placed for one memory cap, over all preferences: of small pipelines, and of large ones.
_EFFORT = 45_000
_LARGE_EFFORT = 8_000
_LARGE = 1_500
"""Number of stages times micro-batches from which a pipeline is large."""
_LEAST_ATTEMPTS = 4
_TOLERANCE = 1e-9
_PERIOD_TOLERANCE = 1e-6
# Up to this number of periods, orders are built for all micro-batches; above it for few, and extended.
_MOST_PERIODS = 8
_FEW_PERIODS = 6
_LEAST_MICRO_BATCHES = 32
# Orders of equal makespan are compared under links with this additional latency, relative to a stage's work.
_LATENCY_SHARE = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class SteadyState:
    """Part of a schedule in which every rank repeats its groups `shift` micro-batches per direction later."""

    shift: int
    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    time: float


def lengthen(schedule: Schedule, costs: CostModel, num_micro_batches: int, shifts: Iterable[int]) -> Schedule | None:
    """Returns the schedule with more micro-batches, or None if no period in `shifts` gives a steady state."""
    added, rest = divmod(num_micro_batches - schedule.num_micro_batches, schedule.num_directions)
    if added == rest == 0:
        return schedule
    simulation = simulate(schedule, costs)
    for shift in shifts:
        steady = None if rest or added % shift else find_steady_state(schedule, simulation, shift)
        if steady is not None:
            return extend(schedule, steady, num_micro_batches)
    return None


def find_steady_state(schedule: Schedule, simulation: Simulation, shift: int) -> SteadyState | None:
    """Returns each rank's last period that repeats, or None. The extended schedule must be validated."""
    last_periods = [_last_period(schedule, simulation, rank, shift) for rank in range(schedule.num_ranks)]
    periods = [period for period in last_periods if period is not None]
    if len(periods) < len(last_periods):
        return None
    times = [time for _, _, time in periods]
    if max(times) - min(times) > _PERIOD_TOLERANCE * max(times):
        return None
    starts, lengths, _ = zip(*periods, strict=True)
    return SteadyState(shift=shift, starts=starts, lengths=lengths, time=max(times))


def _last_period(schedule: Schedule, simulation: Simulation, rank: int, shift: int) -> tuple[int, int, float] | None:
    """Returns first group, number of groups and time of the last period of a rank that is repeated."""
    groups = schedule.ranks[rank]
    starts = simulation.starts[rank]
    stage = schedule.placement[0].index(rank)
    num_stages = len(schedule.stages_of(rank))
    at = {
        op.micro_batch: index
        for index, group in enumerate(groups)
        for op in group
        if op.kind is Op.FORWARD and op.direction == 0 and op.stage == stage
    }
    # The last period that repeats is the farthest from the start of the pipeline.
    for first in reversed(range(len(schedule.micro_batches_of(0)) - 2 * shift + 1)):
        start = at[first]
        end = at[first + shift]
        block = groups[start:end]
        if _is_whole(block, shift * num_stages) and _repeats(groups, start, end - start, shift):
            return start, end - start, starts[end] - starts[start]
    return None


def extend(schedule: Schedule, steady: SteadyState, num_micro_batches: int) -> Schedule:
    """Returns the schedule with the steady state repeated until it has this number of micro-batches."""
    added = (num_micro_batches - schedule.num_micro_batches) // schedule.num_directions
    assert added % steady.shift == 0, f"{added} micro-batches are no multiple of {steady.shift}"
    ranks = []
    for groups, start, length in zip(schedule.ranks, steady.starts, steady.lengths, strict=True):
        block = groups[start : start + length]
        # Start, repeated period, end: micro-batches of the end move by all that were added.
        repeated = [_shifted(group, more) for more in range(steady.shift, added + 1, steady.shift) for group in block]
        rest = [_shifted(group, added) for group in groups[start + length :]]
        ranks.append((*groups[: start + length], *repeated, *rest))
    return replace(schedule, num_micro_batches=num_micro_batches, ranks=tuple(ranks))


def _is_whole(block: Sequence[Group], passages: int) -> bool:
    """Returns whether the block has `passages` F, as many backwards, and a W for every I."""
    counts = Counter(op.kind for group in block for op in group)
    backwards = counts[Op.BACKWARD_INPUT] + counts[Op.BACKWARD]
    return counts[Op.FORWARD] == backwards == passages and counts[Op.BACKWARD_WEIGHT] == counts[Op.BACKWARD_INPUT]


def _repeats(groups: Sequence[Group], start: int, length: int, shift: int) -> bool:
    """Returns whether the block is followed by the same groups with micro-batches that are `shift` later."""
    following = groups[start + length : start + 2 * length]
    return (
        all(
            _shifted(group, shift) == later
            for group, later in zip(groups[start : start + length], following, strict=False)
        )
        and len(following) == length
    )


def _shifted(group: Group, shift: int) -> Group:
    return tuple([Operation(op.kind, op.direction, op.stage, op.micro_batch + shift) for op in group])


class BestSchedule:
    """Best schedule so far, by makespan, then by makespan with slower links, then by memory."""

    def __init__(self, shape: Schedule, costs: CostModel, cap: float) -> None:
        self.shape = shape
        self.costs = costs
        self.cap = cap
        self.bound = lower_bound(shape, costs, cap).value
        self.schedule: Schedule | None = None
        self.makespan = float("inf")
        self._peak = 0.0
        self._slowed_schedule: Schedule | None = None
        self._slowed_makespan = 0.0
        work = [stage.forward + stage.backward_input + stage.backward_weight for stage in costs.stages]
        self._slow_links = replace(costs, latency=costs.latency + _LATENCY_SHARE * sum(work) / len(work))

    def consider(self, schedule: Schedule) -> bool:
        """Keeps the schedule if it is valid, within the cap and better than the best so far; returns whether."""
        try:
            makespan = makespan_of(schedule, self.costs)
        except ScheduleError:
            return False
        peak = max(peak_memory(schedule, self.costs))
        if peak > self.cap + _TOLERANCE or makespan > self.makespan * (1 + _TOLERANCE):
            return False
        is_tie = self.schedule is not None and round(makespan, 9) >= round(self.makespan, 9)
        # Slow links decide, which are simulated only then.
        if is_tie and (self._slowed(schedule), peak) >= (self._slowed(self.schedule), self._peak):
            return False
        try:
            validate(schedule)
        except ScheduleError:
            return False
        self.schedule = schedule
        self.makespan = makespan
        self._peak = peak
        return True

    def _slowed(self, schedule: Schedule | None) -> float:
        """Returns the makespan with slower links; that of the last best schedule is kept."""
        assert schedule is not None, "ties are only between schedules"
        if schedule is not self._slowed_schedule:
            slowed = round(makespan_of(schedule, self._slow_links), 9)
            if schedule is not self.schedule:
                return slowed
            self._slowed_schedule = schedule
            self._slowed_makespan = slowed
        return self._slowed_makespan


def search(
    shape: Schedule, costs: CostModel, cap: float, known_schedules: Iterable[Schedule], *, builds_more: bool = True
) -> Schedule:
    """Returns the best schedule that is found. It is deterministic.

    Args:
        cap: maximum of a rank's live activations, in the unit of `StageCosts.activation`.
        known_schedules: schedules to compare with; invalid ones are ignored.
        builds_more: whether to build other orders even if a known one fits.

    Raises:
        MemoryCapError: if no order fits the memory cap. It names the smallest cap that works.
    """
    check_cap(shape, costs, cap)
    best = BestSchedule(shape, costs, cap)
    # Known orders first; nothing is better than the lower bound.
    for schedule in known_schedules:
        best.consider(schedule)
        if best.makespan <= best.bound * (1 + _TOLERANCE):
            break
    # Largest caps first. A level whose bound is no better than the best schedule ends the search.
    for level in _caps(shape, costs, cap) if builds_more or best.schedule is None else ():
        if lower_bound(shape, costs, level).value >= best.makespan * (1 - _TOLERANCE):
            break
        _Level(best, level).run()
    if best.schedule is None:
        best.consider(in_sequence(shape))
    assert best.schedule is not None, "one micro-batch at a time fits every cap"
    return best.schedule


def check_cap(shape: Schedule, costs: CostModel, cap: float) -> None:
    """Checks that each rank can keep one micro-batch, or all slices of one sequence, in all its stages."""
    needs = [
        shape.slices * sum(costs.stages[stage].activation for way, stage in shape.stages_of(rank) if way == direction)
        for rank in range(shape.num_ranks)
        for direction in range(shape.num_directions)
        if shape.micro_batches_of(direction)
    ]
    if cap < max(needs) - _TOLERANCE:
        raise MemoryCapError(
            f"schedule '{shape.kind}' on {shape.num_ranks} ranks keeps at least {max(needs):g} live activations on a "
            f"rank, one for each of its stages, the cap is {cap:g}; nearest: {max(needs):g}",
            max(needs),
        )


def in_sequence(shape: Schedule) -> Schedule:
    """Returns the schedule in which each rank runs one micro-batch after the other, which fits every cap."""
    ranks: list[list[tuple[Operation, ...]]] = [[] for _ in range(shape.num_ranks)]
    stages = range(shape.num_stages)
    # W directly after I frees the activation before the next stage's I.
    back = [(kind, stage) for stage in reversed(stages) for kind in (Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT)]
    for first in shape.micro_batches_of(0)[:: shape.slices]:
        members = range(first, first + shape.slices)
        for direction in range(shape.num_directions):
            if first in shape.micro_batches_of(direction):
                forwards = [(Op.FORWARD, stage, member) for member in members for stage in stages]
                backwards = [(kind, stage, member) for member in reversed(members) for kind, stage in back]
                for kind, stage, member in forwards + backwards:
                    op = Operation(kind, direction, stage, member)
                    ranks[shape.rank_of(direction, stage)].append((op,))
    return replace(shape, ranks=tuple(map(tuple, ranks)))


def _caps(shape: Schedule, costs: CostModel, cap: float) -> Iterator[float]:
    num_ranks = shape.num_ranks
    unit = shape.slices * max(stage.activation for stage in costs.stages) * shape.num_stages / num_ranks
    series: set[float] = {1, 2, 4, num_ranks // 2, num_ranks + 1, num_ranks + 2, 3 * num_ranks // 2}
    series |= {num_ranks * factor for factor in (2, 3, 4, 6, 8)}
    if not _is_large(shape):
        series |= {3, num_ranks // 3, 3 * num_ranks // 4, num_ranks, 5 * num_ranks // 4}
    if shape.slices > 1:  # a rank keeps parts of sequences
        series |= {num_ranks, 3 * num_ranks // 4 - 1 / shape.slices}
    for size in sorted(series, reverse=True):
        if 0 < size * unit <= cap + _TOLERANCE:
            yield size * unit


def _is_large(shape: Schedule) -> bool:
    return shape.num_micro_batches * shape.num_stages > _LARGE


@dataclass(frozen=True, slots=True)
class _ExtendedOrder:
    """Order of few micro-batches, and the makespan that it would have with all."""

    schedule: Schedule
    steady: SteadyState | None
    makespan: float


class _Level:
    def __init__(self, best: BestSchedule, cap: float) -> None:
        self._best = best
        shape = best.shape
        period = lcm(default_block(shape)[0], shape.slices) * shape.num_directions
        # Slices have shorter ends, but more of them pass before an order repeats.
        few = shape.num_micro_batches % period + _FEW_PERIODS * period * min(2, shape.slices)
        is_short = shape.num_micro_batches // shape.slices <= max(_MOST_PERIODS * period, _LEAST_MICRO_BATCHES)
        self._few = shape if is_short else replace(shape, num_micro_batches=few)
        self._pipeline = Pipeline(self._few, best.costs, cap)
        self._presets = PRESETS if shape.slices == 1 else SLICED_PRESETS

    def run(self) -> None:
        orders: list[_ExtendedOrder] = []
        unsteady: dict[Preset, float] = {}  # whose order of few micro-batches has no steady state
        left = _LARGE_EFFORT * self._best.shape.slices if _is_large(self._best.shape) else _EFFORT
        limit = self._limit()
        attempts = 0
        for preset in self._presets:
            # The steady state repeats after a block, so presets apply only if their blocks fit the added micro-batches.
            shift = preset.steady.blocks(self._few).period(self._few.slices)
            if self._added() % (shift * self._few.num_directions):
                continue
            if attempts >= _LEAST_ATTEMPTS and left <= 0:
                break
            attempt = build_order(self._pipeline, preset, limit)
            attempts += 1
            left -= attempt.effort
            if attempt.ranks is None:
                continue
            order = replace(self._few, ranks=attempt.ranks)
            if not self._added():
                orders.append(_ExtendedOrder(order, None, makespan_of(order, self._best.costs)))
                continue
            simulation = simulate(order, self._best.costs)
            shifts = [shift * times for times in (1, 2) if not self._added() % (shift * times * order.num_directions)]
            found = (find_steady_state(order, simulation, each) for each in shifts)
            steady = next(filter(None, found), None)
            if steady is None:
                unsteady[preset] = simulation.makespan
            else:
                orders.append(self._extended(order, simulation, steady))
        self._consider(orders)
        if self._added() and not orders:
            self._run_whole(sorted(unsteady, key=unsteady.__getitem__))

    def _added(self) -> int:
        return self._best.shape.num_micro_batches - self._few.num_micro_batches

    def _extended(self, order: Schedule, simulation: Simulation, steady: SteadyState) -> _ExtendedOrder:
        periods = self._added() // (steady.shift * order.num_directions)
        return _ExtendedOrder(order, steady, simulation.makespan + periods * steady.time)

    def _consider(self, orders: Sequence[_ExtendedOrder]) -> None:
        """Considers orders from the shortest on while they may be the best; large ones not on a tie."""
        margin = -_TOLERANCE if _is_large(self._best.shape) else _TOLERANCE
        for item in sorted(orders, key=lambda item: item.makespan):
            if item.makespan > self._best.makespan * (1 + margin):
                break
            steady = item.steady
            count = self._best.shape.num_micro_batches
            self._best.consider(item.schedule if steady is None else extend(item.schedule, steady, count))

    def _run_whole(self, presets: Sequence[Preset]) -> None:
        """Builds orders of all micro-batches, which takes long: the first preset if there is a schedule."""
        pipeline = Pipeline(self._best.shape, self._best.costs, self._pipeline.cap)
        for preset in (*presets, *self._presets) if self._best.schedule is None else presets[:1]:
            attempt = build_order(pipeline, preset, self._best.makespan)
            if attempt.ranks is not None and self._best.consider(replace(self._best.shape, ranks=attempt.ranks)):
                break

    def _limit(self) -> float:
        """Returns the makespan that an order of few micro-batches must not exceed to be the best."""
        stages = self._best.costs.stages
        work = sum(stage.forward + stage.backward_input + stage.backward_weight for stage in stages)
        return self._best.makespan - self._added() * work / self._best.shape.num_ranks + _TOLERANCE
