"""Generates ZB-H1 (arXiv:2401.10241), zero bubble 1F1B, which the report of DeepSeek-V3 calls ZB1P."""

from dualpipe.ir import Op, Operation, Schedule, straight_placement
from dualpipe.registry import SCHEDULES, IdleFormula, ScheduleSpec


def zb1p(num_ranks: int, num_micro_batches: int) -> Schedule:
    """Returns 1F1B with split backwards. A rank keeps at most P activations, as in 1F1B. Any P, M >= 1.

    Rank r defers weight gradients by r micro-batches. It has r fewer micro-batches in flight than rank 0, so the
    deferred W need no additional memory. They fill the idle time at the end.
    """
    return Schedule(
        kind="zb1p",
        num_ranks=num_ranks,
        num_micro_batches=num_micro_batches,
        placement=straight_placement(num_ranks),
        ranks=tuple(tuple((op,) for op in _zb1p_rank(rank, num_ranks, num_micro_batches)) for rank in range(num_ranks)),
    )


def _zb1p_rank(rank: int, num_ranks: int, num_micro_batches: int) -> list[Operation]:
    ahead = min(num_ranks - 1 - rank, num_micro_batches)
    num_deferred = min(rank, num_micro_batches)
    order = [Operation(Op.FORWARD, 0, rank, index) for index in range(ahead)]
    for index in range(num_micro_batches):
        if index + ahead < num_micro_batches:
            order.append(Operation(Op.FORWARD, 0, rank, index + ahead))
        order.append(Operation(Op.BACKWARD_INPUT, 0, rank, index))
        if index >= num_deferred:
            order.append(Operation(Op.BACKWARD_WEIGHT, 0, rank, index - num_deferred))
    order += [
        Operation(Op.BACKWARD_WEIGHT, 0, rank, index)
        for index in range(num_micro_batches - num_deferred, num_micro_batches)
    ]
    return order


SCHEDULES.register(
    "zb1p",
    ScheduleSpec(
        name="zb1p",
        summary="1f1b with split backwards and weight gradients in the idle time at its end, in a single direction",
        generate=zb1p,
        idle=IdleFormula(
            text="(P-1)(F+B-2W)",
            assumes="W <= F, W <= I, no exchange and no latency",
            value=lambda num_ranks, costs: (
                (num_ranks - 1) * (costs.forward + costs.backward_input - costs.backward_weight)
            ),
        ),
    ),
)
