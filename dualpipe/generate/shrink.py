"""From a bidirectional schedule to a smaller one: a rank or a micro-batch fewer, everything else in the same order.

What is left waits for less than before, so it ends no later.
"""

from dataclasses import replace

from dualpipe.ir import Group, Schedule


def without_rank(schedule: Schedule, rank: int) -> Schedule:
    """The schedule less one rank and the two stages that it runs; the ranks and stages after it move up.

    Every direction passes through all other ranks as before, so an even number of ranks gives orders for an odd one.

    Args:
        schedule: of two directions, stage s on rank s and on rank P-1-s.
        rank: of at least two.
    """
    num_ranks = schedule.num_ranks - 1
    removed = (rank, num_ranks - rank)

    def moved(group: Group) -> Group:
        return tuple(replace(op, stage=op.stage - 1) if op.stage > removed[op.direction] else op for op in group)

    forwards = tuple(range(num_ranks))
    return replace(
        schedule,
        num_ranks=num_ranks,
        placement=(forwards, forwards[::-1]),
        ranks=tuple(tuple(map(moved, groups)) for number, groups in enumerate(schedule.ranks) if number != rank),
    )


def without_micro_batch(schedule: Schedule, direction: int, micro_batch: int) -> Schedule:
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
