"""DualPipe with every backward split and its orders searched: any number of ranks and micro-batches.

Where the published DualPipe is defined, its order with W taken out of every B and neighbours fused is hard to beat.
Everywhere else, and where time is left above the lower bound, a list builder under searched preferences makes one.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from dualpipe.bounds import lower_bound
from dualpipe.costs import CostModel
from dualpipe.fuse import fuse
from dualpipe.generate.builder import Attempt, Builder
from dualpipe.generate.dualpipe import dualpipe
from dualpipe.generate.preferences import Preferences
from dualpipe.generate.repeat import repeat
from dualpipe.generate.search import Search
from dualpipe.ir import Group, MemoryCapError, Schedule, ScheduleError
from dualpipe.passes import split_weights
from dualpipe.simulate import simulate
from dualpipe.validate import validate

KIND = "dualpipe_split"
_EFFORT = 500_000
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
        ScheduleError: nothing fits the memory cap; names the least that works.
    """
    shape = empty(num_ranks, num_micro_batches)
    cap = (num_ranks + 1) * max(stage.activation for stage in costs.stages) if memory_cap is None else memory_cap
    _check_cap(shape, costs, cap)
    contest = _Contest(costs, cap, lower_bound(shape, costs, cap).value)
    for candidate in _from_published(num_ranks, num_micro_batches, costs):
        contest.enter(candidate)
    if not contest.is_won:
        _search(shape, contest)
    if contest.best is None:
        raise ScheduleError(f"memory_cap: no order was found within {cap:g}; nearest: {num_ranks + 1}")
    return contest.best


def empty(num_ranks: int, num_micro_batches: int) -> Schedule:
    """Placement and counts, without groups."""
    forwards = tuple(range(num_ranks))
    return Schedule(
        kind=KIND,
        num_ranks=num_ranks,
        num_micro_batches=num_micro_batches,
        placement=(forwards, forwards[::-1]),
        ranks=((),) * num_ranks,
    )


class _Contest:
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
        try:
            validate(schedule)
        except ScheduleError:
            return
        late = simulate(schedule, self._late).makespan
        score = (round(simulation.makespan, 9), round(late, 9), max(simulation.peaks))
        if self.best is None or score < self._score:
            self.best, self.makespan, self._score = schedule, simulation.makespan, score


def _from_published(num_ranks: int, num_micro_batches: int, costs: CostModel) -> Iterator[Schedule]:
    """The published order, split and fused; of an odd number of micro-batches, the next even one less one."""
    odd = num_micro_batches % 2
    if num_ranks % 2 or num_micro_batches + odd < 2 * num_ranks:
        return
    few = min(num_micro_batches + odd, 3 * num_ranks + num_ranks % 2)
    base = split_weights(replace(dualpipe(num_ranks, few), kind=KIND), costs)
    if not odd:
        yield from filter(None, [repeat(fuse(base, costs), num_micro_batches)])
        return
    for left_out in sorted({0, few // 4, few // 2 - 1}):
        shorter = fuse(_without(base, 1, left_out), costs)
        yield from filter(None, [repeat(shorter, num_micro_batches)])


def _without(schedule: Schedule, direction: int, micro_batch: int) -> Schedule:
    """The schedule less one micro-batch of the direction; those after it move up."""

    def kept(group: Group) -> Group:
        return tuple(
            replace(op, micro_batch=op.micro_batch - 1)
            if op.direction == direction and op.micro_batch > micro_batch
            else op
            for op in group
            if op.direction != direction or op.micro_batch != micro_batch
        )

    ranks = tuple(tuple(group for group in map(kept, groups) if group) for groups in schedule.ranks)
    return replace(schedule, num_micro_batches=schedule.num_micro_batches - 1, ranks=ranks)


@dataclass(frozen=True, slots=True)
class _Level:
    """A number of micro-batches to search at: few are quick to try, and what they teach holds for more."""

    shape: Schedule
    builder: Builder
    bound: float


def _search(shape: Schedule, contest: _Contest) -> None:
    costs, cap = contest.costs, contest.cap
    search = Search(_EFFORT)
    full = _level(shape, shape.num_micro_batches, costs, cap)
    few = [_fewer(shape, per_rank) for per_rank in (2, 3)]
    levels = [_level(shape, count, costs, cap) for count in few if count < shape.num_micro_batches] or [full]

    def enter(level: _Level, after: Callable[[Attempt], None]) -> Callable[[Preferences, Attempt], bool]:
        def accept(preferences: Preferences, attempt: Attempt) -> bool:
            after(attempt)
            if level is not full:
                attempt = full.builder.build(preferences, contest.makespan)
                search.left -= attempt.effort
            if attempt.ranks is not None:
                contest.enter(fuse(replace(shape, ranks=attempt.ranks), costs))
            return contest.is_won

        return accept

    # First straight at the bound, where an order that must miss it is given up at once.
    share = _EFFORT // 8 if _exchanges(costs) else _EFFORT // 3
    for level in levels:
        if search.reach(level.builder, level.bound * (1 + _TOLERANCE), share, enter(level, lambda _: None)):
            return
    _descend(search, levels[-1], enter)


def _descend(
    search: Search,
    level: _Level,
    enter: Callable[[_Level, Callable[[Attempt], None]], Callable[[Preferences, Attempt], bool]],
) -> None:
    """From any order to shorter ones, while effort is left."""
    shortest = [float("inf")]

    def note(attempt: Attempt) -> None:
        shortest[0] = attempt.time

    accept = enter(level, note)
    while search.left > 0:
        limit = shortest[0] * (1 - 1e-6)
        if search.reach(level.builder, limit, search.left, lambda p, a: accept(p, a) or True) is False:
            return


def _level(shape: Schedule, num_micro_batches: int, costs: CostModel, cap: float) -> _Level:
    sized = replace(shape, num_micro_batches=num_micro_batches)
    return _Level(sized, Builder(sized, costs, cap), lower_bound(sized, costs, cap).value)


def _fewer(shape: Schedule, per_rank: int) -> int:
    """About `per_rank` micro-batches for each rank, odd where the schedule's number is."""
    count = per_rank * shape.num_ranks
    return count + (count + shape.num_micro_batches) % 2


def _exchanges(costs: CostModel) -> bool:
    return any(stage.forward_exchange or stage.backward_exchange for stage in costs.stages)


def _check_cap(shape: Schedule, costs: CostModel, cap: float) -> None:
    """Each rank needs room for one micro-batch of every direction that has any."""
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
