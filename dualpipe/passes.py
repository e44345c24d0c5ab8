"""Transforms schedules with pure functions."""

from dataclasses import replace

from dualpipe.ir import Group, Op, Schedule

# Forwards start before the group frees any activation, as the count of live activations assumes. Weight gradients are
# last, because no rank waits for them. Each kind keeps its order, which is the order of its link.
_PRIORITY = {
    Op.FORWARD: 0,
    Op.BACKWARD: 1,
    Op.BACKWARD_INPUT: 1,
    Op.BACKWARD_WEIGHT: 2,
    Op.OFFLOAD: 3,
    Op.RELOAD: 3,
}


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


def split_backwards(schedule: Schedule) -> Schedule:
    """Replaces every B by I and a separate W after it, so that the input gradient is sent before W runs."""
    return replace(schedule, ranks=tuple(_split(groups) for groups in schedule.ranks))


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
