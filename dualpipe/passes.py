"""Transforms schedules with pure functions. An optimization is kept only if the simulator confirms it."""

from dataclasses import replace

from dualpipe.ir import Group, Op, Schedule
from dualpipe.simulate.costs import CostModel
from dualpipe.simulate.simulate import simulate

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


def split_weights(schedule: Schedule, costs: CostModel) -> Schedule:
    """Replaces every B by I and a later W, to send I's gradient first, unless time or memory grows."""
    split = split_backwards(schedule)
    return split if is_no_worse(split, schedule, costs) else schedule


def split_backwards(schedule: Schedule) -> Schedule:
    """Replaces every B by I and W like `split_weights`, without checking that it helps."""
    return replace(schedule, ranks=tuple(_split(groups) for groups in schedule.ranks))


def is_no_worse(changed: Schedule, schedule: Schedule, costs: CostModel) -> bool:
    """Returns whether neither the makespan nor any rank's peak memory is larger."""
    new, old = simulate(changed, costs), simulate(schedule, costs)
    tolerance = 1e-9 * max(old.makespan, 1.0)
    return new.makespan <= old.makespan + tolerance and all(
        peak <= before + 1e-9 for peak, before in zip(new.peaks, old.peaks, strict=True)
    )


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
