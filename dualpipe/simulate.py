"""A schedule's timing under given costs: a clock per rank, moved by the groups and the values they wait for."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from dualpipe.costs import CostModel, Costs, uniform
from dualpipe.ir import Op, Operation, Schedule, ScheduleError
from dualpipe.memory import peak_memory
from dualpipe.transfers import Value, made_by, message_of, needed_by


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
    starts: list[list[float]] = [[] for _ in schedule.ranks]
    ends: list[list[float]] = [[] for _ in schedule.ranks]
    made_at: dict[Value, float] = {}
    arrival = _arrivals(schedule, model.latency, made_at)
    moved = True
    while moved:
        moved = False
        for rank, groups in enumerate(schedule.ranks):
            while len(ends[rank]) < len(groups):
                group = groups[len(ends[rank])]
                arrivals = [arrival(op) for op in group]
                start = max([ends[rank][-1] if ends[rank] else 0.0, *arrivals])
                if start == math.inf:
                    break
                end = start + model.duration_of(group)
                starts[rank].append(start)
                ends[rank].append(end)
                made_at.update({value: end for op in group if (value := made_by(op, schedule.num_stages)) is not None})
                moved = True
    _check_finished(schedule, ends)
    makespan = max((rank_ends[-1] for rank_ends in ends if rank_ends), default=0.0)
    busy = [sum(map(model.duration_of, groups)) for groups in schedule.ranks]
    computing = [sum(model.compute_of(op) for group in groups for op in group) for groups in schedule.ranks]
    return Simulation(
        starts=tuple(map(tuple, starts)),
        ends=tuple(map(tuple, ends)),
        makespan=makespan,
        idle=tuple(makespan - time for time in busy),
        exposed=tuple(time - compute for time, compute in zip(busy, computing, strict=True)),
        peaks=peak_memory(schedule, model),
    )


def published_idle(num_ranks: int, costs: Costs) -> float:
    """Idle time of every rank under the published DualPipe, (P/2 - 1)(F&B + B - 3W).

    F&B is the time of an overlapped pair. Source: arXiv:2412.19437, table 2.
    """
    model = uniform(costs, num_ranks, num_ranks)
    backward = Operation(Op.BACKWARD, 1, 0, 0)
    pair = model.duration_of((Operation(Op.FORWARD, 0, 0, 0), backward))
    return (num_ranks / 2 - 1) * (pair + model.duration_of((backward,)) - 3 * costs.backward_weight)


def _arrivals(schedule: Schedule, latency: float, made_at: dict[Value, float]) -> Callable[[Operation], float]:
    """When what an operation needs from a neighbouring stage is at hand: infinity while nobody has made it."""

    def arrival(operation: Operation) -> float:
        value = needed_by(operation, schedule.num_stages)
        if value is None:
            return 0.0
        if value not in made_at:
            return math.inf
        return made_at[value] + (latency if message_of(schedule, value) is not None else 0.0)

    return arrival


def _check_finished(schedule: Schedule, ends: list[list[float]]) -> None:
    for rank, groups in enumerate(schedule.ranks):
        if len(ends[rank]) < len(groups):
            group = " ".join(map(str, groups[len(ends[rank])]))
            raise ScheduleError(f"rank {rank}: {group} waits for ever: validate the schedule first")
