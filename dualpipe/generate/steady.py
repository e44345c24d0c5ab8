"""Extends orders of few micro-batches to many by repeating their steady state."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from dualpipe.ir import Group, Op, Operation, Schedule
from dualpipe.simulate.costs import CostModel
from dualpipe.simulate.simulate import Simulation, simulate

_PERIOD_TOLERANCE = 1e-6


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
    found = [_last_period(schedule, simulation, rank, shift) for rank in range(schedule.num_ranks)]
    periods = [period for period in found if period is not None]
    if len(periods) < len(found):
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
    held = len(schedule.stages_of(rank))
    at = {
        op.micro_batch: index
        for index, group in enumerate(groups)
        for op in group
        if op.kind is Op.FORWARD and op.direction == 0 and op.stage == stage
    }
    for first in reversed(range(len(schedule.micro_batches_of(0)) - 2 * shift + 1)):
        start = at[first]
        end = at[first + shift]
        block = groups[start:end]
        if _is_whole(block, shift * held) and _repeats(groups, start, end - start, shift):
            return start, end - start, starts[end] - starts[start]
    return None


def extend(schedule: Schedule, steady: SteadyState, num_micro_batches: int) -> Schedule:
    """Returns the schedule with the steady state repeated until it has this number of micro-batches."""
    added = (num_micro_batches - schedule.num_micro_batches) // schedule.num_directions
    assert added % steady.shift == 0, f"{added} micro-batches are no multiple of {steady.shift}"
    ranks = []
    for groups, start, length in zip(schedule.ranks, steady.starts, steady.lengths, strict=True):
        block = groups[start : start + length]
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
