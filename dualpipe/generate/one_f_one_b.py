"""Generates 1F1B: alternating forwards and backwards (PipeDream-Flush, arXiv:2006.09503, section 2.2)."""

from dualpipe.ir import Group, Op, Operation, Schedule, straight_placement
from dualpipe.registry import SCHEDULES, IdleFormula, ScheduleSpec


def one_f_one_b(num_ranks: int, num_micro_batches: int) -> Schedule:
    """Returns 1F1B: rank r runs P-1-r forwards, then alternates forwards and backwards. Any P, M >= 1."""
    return Schedule(
        kind="1f1b",
        num_ranks=num_ranks,
        num_micro_batches=num_micro_batches,
        placement=straight_placement(num_ranks),
        ranks=tuple(_rank_groups(rank, num_ranks, num_micro_batches) for rank in range(num_ranks)),
    )


def _rank_groups(rank: int, num_ranks: int, num_micro_batches: int) -> tuple[Group, ...]:
    ahead = min(num_ranks - 1 - rank, num_micro_batches)
    groups: list[Group] = [(Operation(Op.FORWARD, 0, rank, index),) for index in range(ahead)]
    for index in range(num_micro_batches):
        if index + ahead < num_micro_batches:
            groups.append((Operation(Op.FORWARD, 0, rank, index + ahead),))
        groups.append((Operation(Op.BACKWARD, 0, rank, index),))
    return tuple(groups)


def one_f_one_b_idle() -> IdleFormula:
    """Returns the idle time of 1F1B, with the costs of one of its micro-batches."""
    return IdleFormula(
        text="(P-1)(F+B)",
        assumes="no exchange and no latency",
        value=lambda num_ranks, costs: (num_ranks - 1) * (costs.forward + costs.backward_input + costs.backward_weight),
    )


SCHEDULES.register(
    "1f1b",
    ScheduleSpec(
        name="1f1b",
        summary="one forward, one backward, in a single direction",
        generate=one_f_one_b,
        idle=one_f_one_b_idle(),
    ),
)
