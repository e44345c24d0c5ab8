"""More micro-batches for a schedule: its steady state, run a few more times."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from dualpipe.ir import Group, Op, Operation, Schedule

_MAX_SHIFT = 3


def repeat(schedule: Schedule, num_micro_batches: int) -> Schedule | None:
    """The schedule with more micro-batches, by what each rank does again and again in its middle.

    A block of groups is steady where the block after it is the same, `shift` micro-batches later. It is put in as
    often as needed, and what follows is renumbered.

    Args:
        schedule: a valid one.
        num_micro_batches: at least as many as it has, and as many more for each direction.

    Returns:
        A schedule that may have to be timed and proven anew; None where some rank has no steady block that fits.
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
            again = [_shifted(group, times * shift) for times in range(1, added // shift + 1) for group in block]
            return (*groups[: start + length], *again, *(_shifted(group, added) for group in rest))
    return None


def _steady_block(groups: Sequence[Group], shift: int) -> tuple[int, int] | None:
    """Start and length of the block that recurs longest, and at least once."""
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
    """Whether it has so many F, as many backwards, and a W for every I."""
    counts = Counter(op.kind for group in block for op in group)
    backwards = counts[Op.BACKWARD_INPUT] + counts[Op.BACKWARD]
    return counts[Op.FORWARD] == backwards == passages and counts[Op.BACKWARD_WEIGHT] == counts[Op.BACKWARD_INPUT]


def _shifted(group: Group, shift: int) -> Group:
    return tuple(Operation(op.kind, op.direction, op.stage, op.micro_batch + shift) for op in group)
