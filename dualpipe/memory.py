"""How many activations a schedule keeps alive, counted without a clock."""

from dualpipe.ir import Group, Op, Schedule


def peak_activations(schedule: Schedule) -> tuple[int, ...]:
    """The most activations of one stage and micro-batch that each rank keeps at once.

    One lives from the start of its F to the end of its B, or of its W where the backward is split. In a
    forward-only schedule it lives as long as its group.
    """
    return tuple(_peak(groups) for groups in schedule.ranks)


def _peak(groups: tuple[Group, ...]) -> int:
    keeps = any(op.kind is not Op.FORWARD for group in groups for op in group)
    alive = peak = 0
    for group in groups:
        made = sum(op.kind is Op.FORWARD for op in group)
        alive += made
        peak = max(peak, alive)
        alive -= sum(op.kind in (Op.BACKWARD, Op.BACKWARD_WEIGHT) for op in group) if keeps else made
    return peak
