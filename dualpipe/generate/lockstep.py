"""Generates lockstep orders: the steady state of DualPipe, extended to both ends of the schedule.

Time is divided into slots. In each slot a rank runs at most one F, one I of the other direction, and the W of that I. A
micro-batch advances by one rank per slot. Its gradient starts one slot after the last F and returns by one rank per
slot. In every second slot one micro-batch enters at each end. If the number of ranks is odd, direction 1 starts one
slot later, so that each slot of a rank pairs an F with an I. On average over a rank's two stages a micro-batch is alive
for P+1 slots, so a rank keeps P+1 activations.

The slots only define the order; ranks run it as fast as they can. With F = I = W, no exchange, and W in idle time
(`weights.place_weights`), the makespan is floor((P-1)/2) above 3M. This is the lower bound for every M >= P.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace

from dualpipe.ir import Group, Op, Operation, Schedule
from dualpipe.optimize.fuse import exchanges
from dualpipe.optimize.weights import place_weights
from dualpipe.simulate.costs import CostModel

_PATIENCE = (0.0, 1.0, 0.5)


def lockstep_orders(shape: Schedule, costs: CostModel, memory_cap: float) -> Iterator[Schedule]:
    """Yields lockstep orders: F and I of a slot paired or separate, with different placements of W.

    They are valid schedules but may exceed the cap.

    Args:
        shape: schedule with two directions, stage s on ranks s and P-1-s; its groups are ignored.
        costs: costs for the placement of W.
        memory_cap: memory cap for the placement of W, in the unit of `StageCosts.activation`.
    """
    together = lockstep(shape, paired=True)
    apart = lockstep(shape, paired=False)
    # With exchange each candidate is also fused, which is slow, so there are fewer candidates.
    orders, patiences = ((together, apart), _PATIENCE[:2]) if exchanges(costs) else ((apart,), _PATIENCE)
    for order in orders:
        for patience in patiences:
            yield from filter(None, [place_weights(order, costs, memory_cap, patience)])
    yield together
    yield _with_whole_backwards(together)


def lockstep(shape: Schedule, *, paired: bool) -> Schedule:
    """Returns the order of slots.

    Args:
        shape: schedule with placement and counts.
        paired: whether F and I of a slot share a group; else I runs before F. W follows in a separate group.
    """
    return replace(shape, ranks=tuple(_rank_groups(shape, rank, paired=paired) for rank in range(shape.num_ranks)))


def _rank_groups(shape: Schedule, rank: int, *, paired: bool) -> tuple[Group, ...]:
    slots: dict[int, list[Operation]] = defaultdict(list)
    for direction, stage in shape.stages_of(rank):
        begin = direction * (shape.num_ranks % 2)
        for micro_batch in shape.micro_batches_of(direction):
            enters = begin + 2 * micro_batch
            slots[enters + stage].append(Operation(Op.FORWARD, direction, stage, micro_batch))
            back = enters + 2 * shape.num_stages - 1 - stage
            slots[back].append(Operation(Op.BACKWARD_INPUT, direction, stage, micro_batch))
    groups: list[Group] = []
    for slot in sorted(slots):
        backward_first = sorted(slots[slot], key=lambda op: op.kind is Op.FORWARD)
        groups += [tuple(reversed(backward_first))] if paired else [(op,) for op in backward_first]
        groups += [(op.with_kind(Op.BACKWARD_WEIGHT),) for op in backward_first if op.kind is not Op.FORWARD]
    return tuple(groups)


def _with_whole_backwards(schedule: Schedule) -> Schedule:
    """Replaces each I that shares a group by B, for exchange that is long enough to hide its W too."""

    def joined(groups: tuple[Group, ...]) -> tuple[Group, ...]:
        whole = {
            op.with_kind(Op.BACKWARD_WEIGHT)
            for group in groups
            for op in group
            if len(group) > 1 and op.kind is Op.BACKWARD_INPUT
        }
        return tuple(
            tuple(op.with_kind(Op.BACKWARD) if op.kind is Op.BACKWARD_INPUT and len(group) > 1 else op for op in group)
            for group in groups
            if group[0] not in whole
        )

    return replace(schedule, ranks=tuple(map(joined, schedule.ranks)))
