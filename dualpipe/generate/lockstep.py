"""Orders in lockstep: the pattern of DualPipe's steady state, carried on to both ends, for any ranks and micro-batches.

Time is cut into slots in which a rank runs at most one F, one I of the other direction, and the I's W. A micro-batch
passes one rank per slot, and its gradient, one slot after its last F, one rank per slot back. Every other slot one
enters at each end; where the number of ranks is odd, direction 1 begins one slot later, so that what meets on a
rank is an F and an I. A micro-batch then lives for P+1 slots on the average of a rank's two stages: P+1 activations.

The slots only give the order: ranks run it as fast as they can. With F = I = W, no exchange and W where the ranks
would wait (`weights.place_weights`) it meets the lower bound, floor((P-1)/2) above 3M, for every M >= P.
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
    """Candidates in lockstep, valid but for the cap: an F and its slot's I together or apart, W here or there.

    Args:
        shape: of two directions, stage s on rank s and on rank P-1-s; its groups are not looked at.
        costs: by which W is placed.
        memory_cap: within which W is placed, in the unit of `StageCosts.activation`.
    """
    together = lockstep(shape, paired=True)
    apart = lockstep(shape, paired=False)
    # Where there is exchange each candidate is fused too, which takes longest.
    orders, patiences = ((together, apart), _PATIENCE[:2]) if exchanges(costs) else ((apart,), _PATIENCE)
    for order in orders:
        for patience in patiences:
            yield from filter(None, [place_weights(order, costs, memory_cap, patience)])
    yield together
    yield _with_whole_backwards(together)


def lockstep(shape: Schedule, *, paired: bool) -> Schedule:
    """The order of slots. `paired`: F and I of a slot in one group; else I, then F. W follows in a group of its own."""
    return replace(shape, ranks=tuple(_rank_groups(shape, rank, paired) for rank in range(shape.num_ranks)))


def _rank_groups(shape: Schedule, rank: int, paired: bool) -> tuple[Group, ...]:
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
        groups += [(replace(op, kind=Op.BACKWARD_WEIGHT),) for op in backward_first if op.kind is not Op.FORWARD]
    return tuple(groups)


def _with_whole_backwards(schedule: Schedule) -> Schedule:
    """Puts B in place of an I that shares its group, where exchange is long enough to hide its W too."""

    def joined(groups: tuple[Group, ...]) -> tuple[Group, ...]:
        whole = {
            replace(op, kind=Op.BACKWARD_WEIGHT)
            for group in groups
            for op in group
            if len(group) > 1 and op.kind is Op.BACKWARD_INPUT
        }
        return tuple(
            tuple(
                replace(op, kind=Op.BACKWARD) if op.kind is Op.BACKWARD_INPUT and len(group) > 1 else op for op in group
            )
            for group in groups
            if group[0] not in whole
        )

    return replace(schedule, ranks=tuple(map(joined, schedule.ranks)))
