"""How many activations a schedule keeps alive, counted without a clock."""

from collections.abc import Callable

from dualpipe.ir import Group, Op, Operation, Schedule
from dualpipe.simulate.costs import CostModel


def peak_activations(schedule: Schedule) -> tuple[int, ...]:
    """The most activations of one stage and micro-batch that each rank keeps at once.

    One lives from the start of its F to the end of its B, or of its W where the backward is split. In a
    forward-only schedule it lives as long as its group.
    """
    return tuple(round(_peak(groups, lambda _: 1.0)) for groups in schedule.ranks)


def peak_memory(schedule: Schedule, costs: CostModel) -> tuple[float, ...]:
    """The same, each activation weighing what its stage keeps: in the unit of `StageCosts.activation`."""
    return tuple(_peak(groups, lambda op: costs.stages[op.stage].activation) for groups in schedule.ranks)


def _peak(groups: tuple[Group, ...], weight: Callable[[Operation], float]) -> float:
    keeps = any(op.kind is not Op.FORWARD for group in groups for op in group)
    alive = peak = 0.0
    for group in groups:
        made = sum(weight(op) for op in group if op.kind is Op.FORWARD)
        alive += made
        peak = max(peak, alive)
        freed = (Op.BACKWARD, Op.BACKWARD_WEIGHT)
        alive -= sum(weight(op) for op in group if op.kind in freed) if keeps else made
    return peak
