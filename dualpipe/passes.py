"""Passes: pure functions from a schedule to a schedule."""

from dataclasses import replace

from dualpipe.ir import Group, Op, Schedule


def forward_only(schedule: Schedule) -> Schedule:
    """The schedule's forwards alone, in their order: what validation runs. Groups left empty go."""
    return replace(schedule, ranks=tuple(_forwards(groups) for groups in schedule.ranks))


def _forwards(groups: tuple[Group, ...]) -> tuple[Group, ...]:
    kept = (tuple(op for op in group if op.kind is Op.FORWARD) for group in groups)
    return tuple(group for group in kept if group)
