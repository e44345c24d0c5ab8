"""Generates DualPipe with split backwards, for any ranks and micro-batches and for given costs.

It first tries lockstep orders, with W placed in idle time and neighbors fused, which are hard to beat
(`generate.lockstep`). If such an order is above the lower bound or does not fit the memory cap, it searches for better
orders with a list builder.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from dualpipe.generate.builder import Attempt, Builder
from dualpipe.generate.dualpipe import dualpipe
from dualpipe.generate.lockstep import lockstep_orders
from dualpipe.generate.preferences import Preferences
from dualpipe.generate.search import Search
from dualpipe.ir import MemoryCapError, Schedule, ScheduleError, mirrored_placement
from dualpipe.optimize.fuse import exchanges, fuse
from dualpipe.optimize.weights import place_weights
from dualpipe.passes import repeat, split_backwards
from dualpipe.registry import SCHEDULES, IdleFormula, ScheduleSpec
from dualpipe.simulate.bounds import lower_bound
from dualpipe.simulate.costs import CostModel
from dualpipe.simulate.simulate import peak_memory, simulate
from dualpipe.validate import validate

KIND = "dualpipe_split"
_EFFORT = 300_000
_TOLERANCE = 1e-9
# Orders of equal makespan are compared under links with this additional latency, relative to a stage's work.
_LATENCY_SHARE = 0.02


def dualpipe_split(
    num_ranks: int, num_micro_batches: int, costs: CostModel, memory_cap: float | None = None
) -> Schedule:
    """Returns the best order known for these costs. It is deterministic.

    Args:
        num_ranks: number of ranks, at least 1.
        num_micro_batches: number of micro-batches of both directions together, at least 1.
        costs: costs of the `num_ranks` stages.
        memory_cap: maximum of a rank's live activations, in the unit of `StageCosts.activation`. None allows
            `num_ranks` + 1 of the largest activations, as in the published DualPipe.

    Raises:
        MemoryCapError: if no order fits the memory cap. It names the smallest cap that works.
    """
    shape = empty(num_ranks, num_micro_batches)
    cap = (num_ranks + 1) * max(stage.activation for stage in costs.stages) if memory_cap is None else memory_cap
    _check_cap(shape, costs, cap)
    best = _BestSchedule(costs, cap, lower_bound(shape, costs, cap).value)
    for candidate in _candidates(shape, costs, cap):
        best.consider(candidate)
        if best.is_optimal:
            break
    else:
        _OrderSearch(shape, best).run()
    if best.schedule is None:
        fits = (num_ranks + 1) * max(stage.activation for stage in costs.stages)
        raise MemoryCapError(
            f"schedule '{KIND}' on {num_ranks} ranks: no order was found within {cap:g}; nearest: {fits:g}", fits
        )
    return best.schedule


def empty(num_ranks: int, num_micro_batches: int) -> Schedule:
    """Returns a schedule with placement and counts but without groups."""
    return Schedule(
        kind=KIND,
        num_ranks=num_ranks,
        num_micro_batches=num_micro_batches,
        placement=mirrored_placement(num_ranks),
        ranks=((),) * num_ranks,
    )


class _BestSchedule:
    """Best schedule so far, by makespan, then by makespan with slower links, then by memory."""

    def __init__(self, costs: CostModel, cap: float, bound: float) -> None:
        self.costs = costs
        self.cap = cap
        self.bound = bound
        self.schedule: Schedule | None = None
        self.makespan = float("inf")
        self._score: tuple[float, ...] = ()
        work = [stage.forward + stage.backward_input + stage.backward_weight for stage in costs.stages]
        self._slow_links = replace(costs, latency=costs.latency + _LATENCY_SHARE * sum(work) / len(work))

    @property
    def is_optimal(self) -> bool:
        """Whether the makespan equals the lower bound."""
        return self.makespan <= self.bound * (1 + _TOLERANCE)

    def consider(self, schedule: Schedule) -> None:
        """Keeps the schedule if it is valid, within the cap and better than the best so far."""
        simulation = simulate(schedule, self.costs)
        if max(simulation.peaks) > self.cap + _TOLERANCE or simulation.makespan > self.makespan * (1 + _TOLERANCE):
            return
        slowed = simulate(schedule, self._slow_links).makespan
        score = (round(simulation.makespan, 9), round(slowed, 9), max(simulation.peaks))
        if self.schedule is not None and score >= self._score:
            return
        try:
            validate(schedule)
        except ScheduleError:
            return
        self.schedule, self.makespan, self._score = schedule, simulation.makespan, score


def _candidates(shape: Schedule, costs: CostModel, cap: float) -> Iterator[Schedule]:
    """Yields known orders, fused. Many micro-batches are derived from a few, because fusing is slow."""
    # Enough micro-batches that a steady state remains between the fused ends.
    few = min(_fewer(shape, 3) + 4, shape.num_micro_batches) if exchanges(costs) else shape.num_micro_batches
    seen = set()
    shortest = float("inf")
    for order in _known_orders(replace(shape, num_micro_batches=few), costs, cap):
        if order.ranks in seen or max(peak_memory(order, costs)) > cap + _TOLERANCE:
            continue
        seen.add(order.ranks)
        fused = fuse(order, costs)
        longer = repeat(fused, shape.num_micro_batches)
        makespan = simulate(fused, costs).makespan
        if longer is not None and makespan <= shortest * (1 + _TOLERANCE):
            shortest = makespan
            yield longer


def _known_orders(shape: Schedule, costs: CostModel, cap: float) -> Iterator[Schedule]:
    """Yields lockstep orders and, if it is defined for the size, the published order with split backwards."""
    yield from lockstep_orders(shape, costs, cap)
    if shape.num_ranks % 2 == 0 and shape.num_micro_batches % 2 == 0 and shape.num_micro_batches >= 2 * shape.num_ranks:
        published = split_backwards(dualpipe(shape.num_ranks, shape.num_micro_batches))
        yield replace(published, kind=KIND)
        yield from filter(None, [place_weights(replace(published, kind=KIND), costs, cap)])


class _OrderSearch:
    """Search for orders with few micro-batches that are extended to all of them."""

    def __init__(self, shape: Schedule, best: _BestSchedule) -> None:
        costs, cap = best.costs, best.cap
        self._best = best
        # With exchange no order reaches the bound, and the search rarely improves on fused orders.
        self._effort = _EFFORT // 4 if best.schedule is not None and exchanges(costs) else _EFFORT
        self._search = Search(self._effort)
        self._full = _level(shape, shape.num_micro_batches, costs, cap)
        few = [count for count in (_fewer(shape, 2), _fewer(shape, 3)) if count < shape.num_micro_batches]
        self._levels = [_level(shape, count, costs, cap) for count in few] or [self._full]

    def run(self) -> None:
        """Searches until the best schedule is optimal or the effort is spent."""
        # First search for orders at the bound: an order that misses it is stopped early.
        share = self._effort // (8 if exchanges(self._best.costs) else 3)
        for level in self._levels:
            if self._search_level(level, level.bound * (1 + _TOLERANCE), share, stops_at_first=False):
                return
        level, shortest = self._levels[-1], float("inf")
        while self._search.left > 0:
            # Then search for orders that are shorter than the shortest one so far.
            aim = min(shortest, level.bound + self._best.makespan - self._best.bound) * (1 - 1e-6)
            shortest = aim
            if self._search_level(level, aim, self._search.left, stops_at_first=True):
                return

    def _search_level(self, level: "_Level", makespan: float, effort: int, *, stops_at_first: bool) -> bool:
        """Searches at one level and returns whether the best schedule is optimal."""

        def accept(preferences: Preferences, attempt: Attempt) -> bool:
            self._consider(level, preferences, attempt)
            return self._best.is_optimal or stops_at_first

        self._search.run(level.builder, makespan, effort, accept)
        return self._best.is_optimal

    def _consider(self, level: "_Level", preferences: Preferences, attempt: Attempt) -> None:
        """Considers the order for all micro-batches: extended by its steady state, or rebuilt."""
        assert attempt.ranks is not None
        costs, count = self._best.costs, self._full.shape.num_micro_batches
        fused = fuse(replace(level.shape, ranks=attempt.ranks), costs)
        longer = repeat(fused, count)
        if longer is not None:
            self._best.consider(longer)
        if level is not self._full and not self._best.is_optimal:
            attempt = self._full.builder.build(preferences, self._best.makespan)
            self._search.left -= attempt.effort
            if attempt.ranks is not None:
                self._best.consider(replace(self._full.shape, ranks=attempt.ranks))


@dataclass(frozen=True, slots=True)
class _Level:
    """Number of micro-batches at which to search. Few are fast to try, and their orders extend to more."""

    shape: Schedule
    builder: Builder
    bound: float


def _level(shape: Schedule, num_micro_batches: int, costs: CostModel, cap: float) -> _Level:
    sized = replace(shape, num_micro_batches=num_micro_batches)
    return _Level(sized, Builder(sized, costs, cap), lower_bound(sized, costs, cap).value)


def _fewer(shape: Schedule, per_rank: int) -> int:
    """Returns about `per_rank` micro-batches for each rank, with the parity of the schedule's number."""
    count = per_rank * shape.num_ranks
    return count + (count + shape.num_micro_batches) % 2


def _check_cap(shape: Schedule, costs: CostModel, cap: float) -> None:
    """Checks that each rank can keep one micro-batch of every direction that has any."""
    busy = [direction for direction in range(2) if shape.micro_batches_of(direction)]
    needs = [
        sum(costs.stages[stage].activation for direction, stage in shape.stages_of(rank) if direction in busy)
        for rank in range(shape.num_ranks)
    ]
    if cap < max(needs) - _TOLERANCE:
        raise MemoryCapError(
            f"schedule '{KIND}' on {shape.num_ranks} ranks keeps at least {max(needs):g} live "
            f"activations on a rank, one for each direction, the cap is {cap:g}; nearest: {max(needs):g}",
            max(needs),
        )


SCHEDULES.register(
    KIND,
    ScheduleSpec(
        name=KIND,
        summary="DualPipe with every backward split, for any ranks and micro-batches, ordered for the costs",
        generate=dualpipe_split,
        placement=mirrored_placement,
        takes_costs=True,
        idle=IdleFormula(
            text="floor((P-1)/2)F",
            assumes="F = I = W, no exchange and no latency",
            value=lambda num_ranks, costs: (num_ranks - 1) // 2 * costs.forward,
        ),
    ),
)
