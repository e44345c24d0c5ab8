"""Adds gradient reduction to programs, and orders the stages for it in the same way on all ranks.

The ranks that hold a stage reduce its gradients together, so they must start reductions in the same order. It is a
function of the schedule, never of time.
"""

from collections.abc import Callable

from dualpipe.ir import Op, Schedule
from dualpipe.runtime.program import Action, Program, Step


def with_reductions(program: Program) -> Program:
    """Adds one REDUCE step for each stage to a training program, after the stage's last run."""
    last = {step.run.stage: index for index, step in enumerate(program.steps) if step.action is Action.FINISH}
    steps: list[Step] = []
    for index, step in enumerate(program.steps):
        steps.append(step)
        if last.get(step.run.stage) == index:
            steps.append(Step(Action.REDUCE, step.run))
    return Program(program.rank, tuple(steps))


def reduction_order(schedule: Schedule) -> tuple[int, ...]:
    """Returns all stages, ordered by the end of their last backward on the rank that finishes it last.

    Ends are counted in groups from the end of a rank's list, because all ranks end at about the same time.
    """
    kinds = (Op.BACKWARD, Op.BACKWARD_WEIGHT)
    num_after = {
        (rank, op.stage): len(groups) - index
        for rank, groups in enumerate(schedule.ranks)
        for index, group in enumerate(groups)
        for op in group
        if op.kind in kinds
    }
    return _sorted_stages(schedule, lambda stage: -min(n for (_, held), n in num_after.items() if held == stage))


def first_use_order(schedule: Schedule) -> tuple[int, ...]:
    """Returns all stages, ordered by their first forward on the rank that runs it first."""
    first: dict[int, int] = {}
    for groups in schedule.ranks:
        for index, group in enumerate(groups):
            for op in group:
                if op.kind is Op.FORWARD:
                    first[op.stage] = min(index, first.get(op.stage, index))
    return _sorted_stages(schedule, first.__getitem__)


def _sorted_stages(schedule: Schedule, key: Callable[[int], int]) -> tuple[int, ...]:
    return tuple(sorted(range(schedule.num_stages), key=lambda stage: (key(stage), stage)))
