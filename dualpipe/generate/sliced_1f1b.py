"""Generates 1F1B over slices of sequences (Seq1F1B, arXiv:2406.03488; SlimPipe, arXiv:2504.14519).

Every sequence is cut along its tokens into n slices. Causal attention needs earlier slices only, so forwards run slice
by slice, and backwards in reverse. A rank keeps at most n + P - 1 slices: 1 + (P - 1) / n sequences in place of the P
sequences of 1F1B.
"""

from dualpipe.generate.one_f_one_b import one_f_one_b_idle
from dualpipe.ir import Group, Op, Operation, Schedule, straight_placement
from dualpipe.registry import SCHEDULES, ScheduleSpec


def sliced_1f1b(num_ranks: int, num_micro_batches: int, slices: int) -> Schedule:
    """Returns 1F1B over slices.

    Args:
        num_ranks: P, at least 1.
        num_micro_batches: number of slices of all sequences, a multiple of `slices`.
        slices: slices of each sequence; with 1 the order is that of 1F1B.
    """
    return Schedule(
        kind="sliced_1f1b",
        num_ranks=num_ranks,
        num_micro_batches=num_micro_batches,
        placement=straight_placement(num_ranks),
        ranks=tuple(_rank_groups(rank, num_ranks, num_micro_batches, slices) for rank in range(num_ranks)),
        slices=slices,
    )


def _rank_groups(rank: int, num_ranks: int, num_micro_batches: int, slices: int) -> tuple[Group, ...]:
    """Returns a rank's groups: forwards before its first backward, then a forward and a backward in turn."""
    # The first backward is that of a sequence's last slice, so a rank is n - 1 more forwards ahead than in 1F1B.
    ahead = min(num_ranks - 1 - rank + slices - 1, num_micro_batches)
    groups: list[Group] = [(Operation(Op.FORWARD, 0, rank, index),) for index in range(ahead)]
    for index in range(num_micro_batches):
        if index + ahead < num_micro_batches:
            groups.append((Operation(Op.FORWARD, 0, rank, index + ahead),))
        sequence, after = divmod(index, slices)
        groups.append((Operation(Op.BACKWARD, 0, rank, (sequence + 1) * slices - 1 - after),))
    return tuple(groups)


SCHEDULES.register(
    "sliced_1f1b",
    ScheduleSpec(
        name="sliced_1f1b",
        summary="1F1B over slices of sequences, in a single direction",
        generate=sliced_1f1b,
        takes_slices=True,
        may_be_chosen=False,
        idle=one_f_one_b_idle(),
    ),
)
