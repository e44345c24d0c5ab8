"""Generates 1F1B, of whole sequences or of slices (PipeDream-Flush, arXiv:2006.09503, section 2.2).

If sequences are cut along their tokens into n slices (Seq1F1B, arXiv:2406.03488; SlimPipe, arXiv:2504.14519), forwards
run slice by slice, as causal attention needs earlier slices only, and backwards in reverse. A rank keeps at most
n + P - 1 slices: 1 + (P - 1) / n sequences in place of the P sequences of 1F1B.
"""

from dualpipe.ir import Group, Op, Operation, Schedule, straight_placement
from dualpipe.registry import SCHEDULES, IdleFormula, ScheduleSpec


def one_f_one_b(num_ranks: int, num_micro_batches: int, slices: int = 1) -> Schedule:
    """Returns 1F1B: rank r runs P-1-r forwards, then alternates forwards and backwards. Any P, M >= 1.

    With n slices, M counts slices, and a rank runs n-1 more forwards first.
    """
    return Schedule(
        kind="1f1b",
        num_ranks=num_ranks,
        num_micro_batches=num_micro_batches,
        placement=straight_placement(num_ranks),
        ranks=tuple(_rank_groups(rank, num_ranks, num_micro_batches, slices) for rank in range(num_ranks)),
        slices=slices,
    )


def _rank_groups(rank: int, num_ranks: int, num_micro_batches: int, slices: int) -> tuple[Group, ...]:
    # The first backward is that of a sequence's last slice, so a rank is n - 1 more forwards ahead than in 1F1B.
    ahead = min(num_ranks - 1 - rank + slices - 1, num_micro_batches)
    groups: list[Group] = [(Operation(Op.FORWARD, 0, rank, index),) for index in range(ahead)]
    for index in range(num_micro_batches):
        if index + ahead < num_micro_batches:
            groups.append((Operation(Op.FORWARD, 0, rank, index + ahead),))
        # Slices of a sequence run backward in reverse, because later tokens attend to earlier ones.
        sequence, after = divmod(index, slices)
        groups.append((Operation(Op.BACKWARD, 0, rank, (sequence + 1) * slices - 1 - after),))
    return tuple(groups)


_SPEC = SCHEDULES.register(
    "1f1b",
    ScheduleSpec(
        name="1f1b",
        summary="one forward, one backward, in a single direction, of sequences or their slices",
        generate=one_f_one_b,
        takes_slices=True,
        idle=IdleFormula(
            text="(P-1)(F+B)",
            assumes="no exchange and no latency",
            value=lambda num_ranks, costs: (
                (num_ranks - 1) * (costs.forward + costs.backward_input + costs.backward_weight)
            ),
        ),
    ),
)
SCHEDULES.register_former("sliced_1f1b", _SPEC, "1f1b")
