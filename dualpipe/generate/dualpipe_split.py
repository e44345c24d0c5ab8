"""DualPipe with every backward split: any number of ranks and micro-batches, ordered for the costs at hand.

An order in lockstep comes first: with W where the ranks would wait and neighbors fused it is hard to beat
(`generate.lockstep`). Where it leaves time above the lower bound, or does not fit the memory cap, a list builder under
searched preferences looks for more.
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
# A link that is a little late should not cost more than it must: orders of equal makespan are told apart by this.
_LATENCY_SHARE = 0.02


def dualpipe_split(
    num_ranks: int, num_micro_batches: int, costs: CostModel, memory_cap: float | None = None
) -> Schedule:
    """The best order known for these costs; deterministic.

    Args:
        num_ranks: at least 1.
        num_micro_batches: at least 1, both directions together.
        costs: of the `num_ranks` stages.
        memory_cap: of a rank's live activations, in the unit of `StageCosts.activation`; None for what one more
            than `num_ranks` of the heaviest need, as the published DualPipe does.

    Raises:
        MemoryCapError: nothing fits the memory cap; names the least that works.
    """
    shape = empty(num_ranks, num_micro_batches)
    cap = (num_ranks + 1) * max(stage.activation for stage in costs.stages) if memory_cap is None else memory_cap
    _check_cap(shape, costs, cap)
    contest = _BestSchedule(costs, cap, lower_bound(shape, costs, cap).value)
    for candidate in _candidates(shape, costs, cap):
        contest.enter(candidate)
        if contest.is_won:
            break
    else:
        _OrderSearch(shape, contest).run()
    if contest.best is None:
        fits = (num_ranks + 1) * max(stage.activation for stage in costs.stages)
        raise MemoryCapError(
            f"schedule '{KIND}' on {num_ranks} ranks: no order was found within {cap:g}; nearest: {fits:g}", fits
        )
    return contest.best


def empty(num_ranks: int, num_micro_batches: int) -> Schedule:
    """Returns placement and counts, without groups."""
    return Schedule(
        kind=KIND,
        num_ranks=num_ranks,
        num_micro_batches=num_micro_batches,
        placement=mirrored_placement(num_ranks),
        ranks=((),) * num_ranks,
    )


class _BestSchedule:
    """Keeps the best schedule entered: makespan first, then how little late links cost, then memory."""

    def __init__(self, costs: CostModel, cap: float, bound: float) -> None:
        self.costs = costs
        self.cap = cap
        self.bound = bound
        self.best: Schedule | None = None
        self.makespan = float("inf")
        self._score: tuple[float, ...] = ()
        work = [stage.forward + stage.backward_input + stage.backward_weight for stage in costs.stages]
        self._late = replace(costs, latency=costs.latency + _LATENCY_SHARE * sum(work) / len(work))

    @property
    def is_won(self) -> bool:
        """Whether nothing can be shorter."""
        return self.makespan <= self.bound * (1 + _TOLERANCE)

    def enter(self, schedule: Schedule) -> None:
        """Takes a schedule that is valid and within the cap, and better than those before."""
        simulation = simulate(schedule, self.costs)
        if max(simulation.peaks) > self.cap + _TOLERANCE or simulation.makespan > self.makespan * (1 + _TOLERANCE):
            return
        late = simulate(schedule, self._late).makespan
        score = (round(simulation.makespan, 9), round(late, 9), max(simulation.peaks))
        if self.best is not None and score >= self._score:
            return
        try:
            validate(schedule)
        except ScheduleError:
            return
        self.best, self.makespan, self._score = schedule, simulation.makespan, score


def _candidates(shape: Schedule, costs: CostModel, cap: float) -> Iterator[Schedule]:
    """Yields known orders, fused: at a few micro-batches where there are many, as fusing is slow."""
    # The steady state must recur between what the ends have fused.
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
    """Yields orders in lockstep, and the published ones with W taken out of every B, where they exist."""
    yield from lockstep_orders(shape, costs, cap)
    if shape.num_ranks % 2 == 0 and shape.num_micro_batches % 2 == 0 and shape.num_micro_batches >= 2 * shape.num_ranks:
        published = split_backwards(dualpipe(shape.num_ranks, shape.num_micro_batches))
        yield replace(published, kind=KIND)
        yield from filter(None, [place_weights(replace(published, kind=KIND), costs, cap)])


class _OrderSearch:
    """A search at a few micro-batches for orders of all of them."""

    def __init__(self, shape: Schedule, contest: _BestSchedule) -> None:
        costs, cap = contest.costs, contest.cap
        self._contest = contest
        # Under exchange no order meets the bound, and a search seldom betters what neighbors fused give.
        self._effort = _EFFORT // 4 if contest.best is not None and exchanges(costs) else _EFFORT
        self._search = Search(self._effort)
        self._full = _level(shape, shape.num_micro_batches, costs, cap)
        few = [count for count in (_fewer(shape, 2), _fewer(shape, 3)) if count < shape.num_micro_batches]
        self._levels = [_level(shape, count, costs, cap) for count in few] or [self._full]

    def run(self) -> None:
        """Until nothing can be shorter, or the effort is spent."""
        # First straight at the bound, where an order that must miss it is given up at once.
        share = self._effort // (8 if exchanges(self._contest.costs) else 3)
        for level in self._levels:
            if self._reach(level, level.bound * (1 + _TOLERANCE), share, patient=True):
                return
        level, shortest = self._levels[-1], float("inf")
        while self._search.left > 0:
            # Then from any order that promises more than the best so far to shorter ones.
            aim = min(shortest, level.bound + self._contest.makespan - self._contest.bound) * (1 - 1e-6)
            shortest = aim
            if self._reach(level, aim, self._search.left, patient=False):
                return

    def _reach(self, level: "_Level", makespan: float, effort: int, *, patient: bool) -> bool:
        """Returns whether the contest is won; where not patient, it comes back with the first order found."""

        def accept(preferences: Preferences, attempt: Attempt) -> bool:
            self._enter(level, preferences, attempt)
            return self._contest.is_won or not patient

        self._search.reach(level.builder, makespan, effort, accept)
        return self._contest.is_won

    def _enter(self, level: "_Level", preferences: Preferences, attempt: Attempt) -> None:
        """Enters the order itself, or what its steady state or its preferences give for all micro-batches."""
        assert attempt.ranks is not None
        costs, count = self._contest.costs, self._full.shape.num_micro_batches
        fused = fuse(replace(level.shape, ranks=attempt.ranks), costs)
        longer = repeat(fused, count)
        if longer is not None:
            self._contest.enter(longer)
        if level is not self._full and not self._contest.is_won:
            attempt = self._full.builder.build(preferences, self._contest.makespan)
            self._search.left -= attempt.effort
            if attempt.ranks is not None:
                self._contest.enter(replace(self._full.shape, ranks=attempt.ranks))


@dataclass(frozen=True, slots=True)
class _Level:
    """A number of micro-batches to search at: few are quick to try, and what they teach holds for more."""

    shape: Schedule
    builder: Builder
    bound: float


def _level(shape: Schedule, num_micro_batches: int, costs: CostModel, cap: float) -> _Level:
    sized = replace(shape, num_micro_batches=num_micro_batches)
    return _Level(sized, Builder(sized, costs, cap), lower_bound(sized, costs, cap).value)


def _fewer(shape: Schedule, per_rank: int) -> int:
    """Returns about `per_rank` micro-batches for each rank, odd where the schedule's number is."""
    count = per_rank * shape.num_ranks
    return count + (count + shape.num_micro_batches) % 2


def _check_cap(shape: Schedule, costs: CostModel, cap: float) -> None:
    """Checks that each rank has room for one micro-batch of every direction that has any."""
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
