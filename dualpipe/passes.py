"""Transforms schedules with pure functions. An optimization is kept only if the simulator confirms it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from dualpipe.ir import Group, Op, Operation, Schedule
from dualpipe.simulate.costs import CostModel
from dualpipe.simulate.simulate import simulate

# Forwards start before the group frees any activation, as the count of live activations assumes. Weight gradients are
# last, because no rank waits for them. Each kind keeps its order, which is the order of its link.
_PRIORITY = {Op.FORWARD: 0, Op.BACKWARD: 1, Op.BACKWARD_INPUT: 1, Op.BACKWARD_WEIGHT: 2}


def order_members(group: Group) -> Group:
    """Returns the operations of a group in the order in which a rank runs them in sequence."""
    return tuple(sorted(group, key=lambda op: _PRIORITY[op.kind]))


def forward_only(schedule: Schedule) -> Schedule:
    """Returns the schedule with only its forwards, in their order, for validation. Drops empty groups."""
    return replace(schedule, ranks=tuple(_forwards(groups) for groups in schedule.ranks))


def ungroup(schedule: Schedule) -> Schedule:
    """Returns the schedule without overlap: one group per operation, in the order of `order_members`."""
    ranks = (tuple((op,) for group in groups for op in order_members(group)) for groups in schedule.ranks)
    return replace(schedule, ranks=tuple(ranks))


def split_weights(schedule: Schedule, costs: CostModel) -> Schedule:
    """Replaces every B by I and a separate W after it, so that the input gradient is sent before W runs.

    Args:
        schedule: a valid schedule.
        costs: costs under which the split is evaluated.

    Returns:
        The split schedule, or the original one if the split would increase makespan or peak memory.
    """
    split = split_backwards(schedule)
    return split if is_no_worse(split, schedule, costs) else schedule


def split_backwards(schedule: Schedule) -> Schedule:
    """Replaces every B by I and W like `split_weights`, without checking that it helps."""
    return replace(schedule, ranks=tuple(_split(groups) for groups in schedule.ranks))


def is_no_worse(changed: Schedule, schedule: Schedule, costs: CostModel) -> bool:
    """Returns whether neither the makespan nor any rank's peak memory is larger."""
    new, old = simulate(changed, costs), simulate(schedule, costs)
    tolerance = 1e-9 * max(old.makespan, 1.0)
    return new.makespan <= old.makespan + tolerance and all(
        peak <= before + 1e-9 for peak, before in zip(new.peaks, old.peaks, strict=True)
    )


def _forwards(groups: tuple[Group, ...]) -> tuple[Group, ...]:
    kept = (tuple(op for op in group if op.kind is Op.FORWARD) for group in groups)
    return tuple(group for group in kept if group)


def _split(groups: tuple[Group, ...]) -> tuple[Group, ...]:
    made: list[Group] = []
    for group in groups:
        backwards = [op for op in group if op.kind is Op.BACKWARD]
        made.append(tuple(op.with_kind(Op.BACKWARD_INPUT) if op.kind is Op.BACKWARD else op for op in group))
        made += [(op.with_kind(Op.BACKWARD_WEIGHT),) for op in backwards]
    return tuple(made)


_MAX_SHIFT = 3


def repeat(schedule: Schedule, num_micro_batches: int) -> Schedule | None:
    """Extends the schedule to more micro-batches by repeating each rank's steady state.

    A block of groups is steady if the next block is equal except that its micro-batches are `shift` later. The block is
    inserted as often as needed, and the groups after it are renumbered.

    Args:
        schedule: a valid schedule.
        num_micro_batches: new number of micro-batches. The increase must be equal for each direction.

    Returns:
        A schedule that must be validated again, or None if some rank has no steady block that fits.
    """
    added, rest = divmod(num_micro_batches - schedule.num_micro_batches, schedule.num_directions)
    if added < 0 or rest:
        return None
    ranks = []
    for groups in schedule.ranks:
        longer = _lengthened(groups, added)
        if longer is None:
            return None
        ranks.append(longer)
    return replace(schedule, num_micro_batches=num_micro_batches, ranks=tuple(ranks))


def _lengthened(groups: tuple[Group, ...], added: int) -> tuple[Group, ...] | None:
    if added == 0:
        return groups
    for shift in range(1, _MAX_SHIFT + 1):
        found = None if added % shift else _steady_block(groups, shift)
        if found is not None:
            start, length = found
            block, rest = groups[start : start + length], groups[start + length :]
            repeated = [_shifted(group, times * shift) for times in range(1, added // shift + 1) for group in block]
            return (*groups[: start + length], *repeated, *(_shifted(group, added) for group in rest))
    return None


def _steady_block(groups: Sequence[Group], shift: int) -> tuple[int, int] | None:
    """Returns start and length of the block that repeats over the longest range, or None."""
    stages = {(op.direction, op.stage) for group in groups for op in group}
    best, best_run = None, 0
    moved = [_shifted(group, shift) for group in groups]
    for length in range(1, 3 * shift * len(stages) + 1):
        run = 0
        for index in range(len(groups) - length):
            run = run + 1 if groups[index + length] == moved[index] else 0
            start = index - run + 1
            if run > max(best_run, length - 1) and _is_whole(groups[start : start + length], shift * len(stages)):
                best, best_run = (start, length), run
    return best


def _is_whole(block: Sequence[Group], passages: int) -> bool:
    """Returns whether the block has `passages` F, as many backwards, and a W for every I."""
    counts = Counter(op.kind for group in block for op in group)
    backwards = counts[Op.BACKWARD_INPUT] + counts[Op.BACKWARD]
    return counts[Op.FORWARD] == backwards == passages and counts[Op.BACKWARD_WEIGHT] == counts[Op.BACKWARD_INPUT]


def _shifted(group: Group, shift: int) -> Group:
    return tuple(Operation(op.kind, op.direction, op.stage, op.micro_batch + shift) for op in group)
