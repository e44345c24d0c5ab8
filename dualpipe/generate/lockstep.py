"""Generates lockstep orders: the steady state of DualPipe, extended to both ends of the schedule.

In each slot of time a rank runs at most one F, one I of the other direction, and the W of that I. A micro-batch
advances by one stage per slot, and its gradient returns in the same way. Micro-batches enter at each end in blocks of
P/2, one in every second slot. A block enters when the chunks of the block before it have left the first rank free. If
the number of ranks is odd, direction 1 starts one slot later, so that each slot of a rank pairs an F with an I.

With v chunks a rank keeps P + 1/v activations of model/P. With F = I = W, no exchange, and W in idle time
(`passes.place_weights`), the makespan is floor((P-1)/2) above 3M with one chunk, which is the lower bound for every
M >= P, and (P-1)/(2v) with v chunks and an even P.
"""

from collections import defaultdict
from dataclasses import replace

from dualpipe.ir import Group, Op, Operation, Schedule


def lockstep(shape: Schedule, *, paired: bool) -> Schedule:
    """Returns the order of slots: F and I share a group (`paired`), or I runs before F. W follows."""
    return replace(shape, ranks=tuple(_rank_groups(shape, rank, paired=paired) for rank in range(shape.num_ranks)))


def _rank_groups(shape: Schedule, rank: int, *, paired: bool) -> tuple[Group, ...]:
    slots: dict[int, list[Operation]] = defaultdict(list)
    for direction, stage in shape.stages_of(rank):
        for micro_batch in shape.micro_batches_of(direction):
            # F advances by a stage per slot, and I returns in the same way after the last stage.
            enters = _entry_slot(shape, direction, micro_batch)
            slots[enters + stage].append(Operation(Op.FORWARD, direction, stage, micro_batch))
            back = enters + 2 * shape.num_stages - 1 - stage
            slots[back].append(Operation(Op.BACKWARD_INPUT, direction, stage, micro_batch))
    groups: list[Group] = []
    for slot in sorted(slots):
        # A shared group lists F first, as `passes.order_members` does.
        backward_first = sorted(slots[slot], key=lambda op: op.kind is Op.FORWARD)
        groups += [tuple(reversed(backward_first))] if paired else [(op,) for op in backward_first]
        groups += [(op.with_kind(Op.BACKWARD_WEIGHT),) for op in backward_first if op.kind is not Op.FORWARD]
    return tuple(groups)


def _entry_slot(shape: Schedule, direction: int, micro_batch: int) -> int:
    block = max(1, shape.num_ranks // 2)
    if shape.num_stages == shape.num_ranks:
        return direction * (shape.num_ranks % 2) + 2 * micro_batch
    return direction * (shape.num_ranks % 2) + micro_batch // block * shape.num_stages + 2 * (micro_batch % block)
