"""Passes: pure functions from schedule to schedule. One that claims to help is kept only if the simulator agrees."""

from dataclasses import replace

from dualpipe.ir import Group, Op, Operation, Schedule
from dualpipe.simulate.costs import CostModel
from dualpipe.simulate.simulate import simulate

# Forwards begin before anything of the group is given free, as the count of live activations has it; weight gradients
# come last, as nobody waits for them. Each kind keeps its order, which is that of its link.
_TURN = {Op.FORWARD: 0, Op.BACKWARD: 1, Op.BACKWARD_INPUT: 1, Op.BACKWARD_WEIGHT: 2}


def in_turn(group: Group) -> Group:
    """The members in the order in which a rank takes them."""
    return tuple(sorted(group, key=lambda op: _TURN[op.kind]))


def forward_only(schedule: Schedule) -> Schedule:
    """The schedule's forwards alone, in their order: what validation runs. Groups left empty go."""
    return replace(schedule, ranks=tuple(_forwards(groups) for groups in schedule.ranks))


def one_at_a_time(schedule: Schedule) -> Schedule:
    """The schedule as ranks run it that overlap nothing: a group for each operation, members in their turn."""
    ranks = (tuple((op,) for group in groups for op in in_turn(group)) for groups in schedule.ranks)
    return replace(schedule, ranks=tuple(ranks))


def split_weights(schedule: Schedule, costs: CostModel) -> Schedule:
    """I in place of every B, and its W in a group of its own right after: the input gradient leaves before W runs.

    Args:
        schedule: a valid one.
        costs: what the split is judged by.

    Returns:
        The schedule as it was where makespan or peak memory would be worse.
    """
    split = split_backwards(schedule)
    return split if is_no_worse(split, schedule, costs) else schedule


def split_backwards(schedule: Schedule) -> Schedule:
    """As `split_weights`, whatever it costs."""
    return replace(schedule, ranks=tuple(_split(groups) for groups in schedule.ranks))


def is_no_worse(changed: Schedule, schedule: Schedule, costs: CostModel) -> bool:
    """Whether neither the makespan nor any rank's peak memory has grown."""
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
        made.append(tuple(_as(op, Op.BACKWARD_INPUT) if op.kind is Op.BACKWARD else op for op in group))
        made += [(_as(op, Op.BACKWARD_WEIGHT),) for op in backwards]
    return tuple(made)


def _as(op: Operation, kind: Op) -> Operation:
    return replace(op, kind=kind)
