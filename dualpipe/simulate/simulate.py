"""A schedule's timing under given costs, and the activations that it keeps alive.

The timing is a clock per rank, moved by the groups and the values they wait for. Activations need no clock.
"""

from collections.abc import Callable
from dataclasses import dataclass

from dualpipe.ir import Group, Op, Operation, Schedule, ScheduleError
from dualpipe.simulate.costs import CostModel, Costs, uniform
from dualpipe.simulate.timing import NumberedGroup, Timing


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """When everything happens, in the unit of the costs.

    `starts[rank][group]` and `ends[rank][group]`; `idle[rank]` is the part of the makespan in which the rank runs
    no group; `exposed[rank]` the part in which it runs a group whose exchange nothing hides; `peaks[rank]` is its
    peak memory, in the unit of `StageCosts.activation`.
    """

    starts: tuple[tuple[float, ...], ...]
    ends: tuple[tuple[float, ...], ...]
    makespan: float
    idle: tuple[float, ...]
    exposed: tuple[float, ...]
    peaks: tuple[float, ...]

    @property
    def bubble_fraction(self) -> float:
        """Idle time of all ranks over their time."""
        total = self.makespan * len(self.idle)
        return sum(self.idle) / total if total else 0.0


def simulate(schedule: Schedule, costs: Costs | CostModel) -> Simulation:
    """Runs the schedule on ideal ranks: a group starts when its rank is free and all that it needs has arrived.

    Everything that a group makes leaves at the group's end, the gradient of a full backward included. Sending
    takes none of the rank's time.

    Args:
        schedule: a valid one.
        costs: of each stage, or of model/P where all stages are equal.

    Raises:
        ScheduleError: the ranks wait for each other.
    """
    model = uniform(costs, schedule.num_ranks, schedule.num_stages) if isinstance(costs, Costs) else costs
    timing = Timing(schedule, model)
    ranks = [timing.numbered(groups) for groups in schedule.ranks]
    ended = timing.run(ranks)
    _check_finished(schedule, ranks, ended)
    durations = [[timing.duration(group) for group in groups] for groups in ranks]
    ends = [[ended[group[0]] for group in groups] for groups in ranks]
    makespan = max((rank_ends[-1] for rank_ends in ends if rank_ends), default=0.0)
    busy = [sum(times) for times in durations]
    computing = [sum(map(timing.compute, groups)) for groups in ranks]
    return Simulation(
        starts=tuple(
            tuple(end - time for end, time in zip(*both, strict=True)) for both in zip(ends, durations, strict=True)
        ),
        ends=tuple(map(tuple, ends)),
        makespan=makespan,
        idle=tuple(makespan - time for time in busy),
        exposed=tuple(time - compute for time, compute in zip(busy, computing, strict=True)),
        peaks=peak_memory(schedule, model),
    )


def _check_finished(schedule: Schedule, ranks: list[list[NumberedGroup]], ended: list[float]) -> None:
    for rank, groups in enumerate(ranks):
        for index, group in enumerate(groups):
            if ended[group[0]] < 0:
                shown = " ".join(map(str, schedule.ranks[rank][index]))
                raise ScheduleError(f"rank {rank}: {shown} waits for ever: validate the schedule first")


def peak_activations(schedule: Schedule) -> tuple[int, ...]:
    """Returns the most activations of one stage and micro-batch that each rank keeps at once.

    One lives from the start of its F to the end of its B, or of its W where the backward is split. In a
    forward-only schedule it lives as long as its group.
    """
    return tuple(round(_peak(groups, lambda _: 1.0)) for groups in schedule.ranks)


def peak_memory(schedule: Schedule, costs: CostModel) -> tuple[float, ...]:
    """Returns the same, each activation weighing what its stage keeps: in the unit of `StageCosts.activation`."""
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
