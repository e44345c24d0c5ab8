"""A schedule's timing under given costs: a clock per rank, moved by the groups and the values they wait for."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import assert_never

from dualpipe.ir import Group, Op, Operation, Schedule, ScheduleError
from dualpipe.memory import peak_activations
from dualpipe.transfers import Value, made_by, message_of, needed_by


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Times of one stage, in any one unit.

    `forward`, `backward_input` and `backward_weight` are computation; a full backward is the sum of the last two.
    `exchange` is the exchange of one F and of one I, apart from computation. `latency` is the time from the end of
    a group to the arrival of what it made at another rank.

    Raises:
        ScheduleError: a time is negative or not finite.
    """

    forward: float
    backward_input: float
    backward_weight: float
    exchange: float
    latency: float

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (math.isfinite(value) and value >= 0):
                raise ScheduleError(f"costs.{field.name}: must be a finite time of at least 0, is {value}")

    def compute_of(self, kind: Op) -> float:
        """Computation of one operation."""
        match kind:
            case Op.FORWARD:
                return self.forward
            case Op.BACKWARD:
                return self.backward_input + self.backward_weight
            case Op.BACKWARD_INPUT:
                return self.backward_input
            case Op.BACKWARD_WEIGHT:
                return self.backward_weight
            case _ as other:
                assert_never(other)

    def exchange_of(self, kind: Op) -> float:
        """Exchange of one operation: weight gradients need none."""
        return 0.0 if kind is Op.BACKWARD_WEIGHT else self.exchange

    def duration_of(self, group: Group) -> float:
        """A group's time: its members share both lanes perfectly, and none is faster than it would be alone."""
        compute = [self.compute_of(op.kind) for op in group]
        exchange = [self.exchange_of(op.kind) for op in group]
        longest = max(map(sum, zip(compute, exchange, strict=True)), default=0.0)
        return max(sum(compute), sum(exchange), longest)


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """When everything happens, in the unit of the costs.

    `starts[rank][group]` and `ends[rank][group]`; `idle[rank]` is the part of the makespan in which the rank runs
    no group; `peaks[rank]` is its peak of live activations.
    """

    starts: tuple[tuple[float, ...], ...]
    ends: tuple[tuple[float, ...], ...]
    makespan: float
    idle: tuple[float, ...]
    peaks: tuple[int, ...]

    @property
    def bubble_fraction(self) -> float:
        """Idle time of all ranks over their time."""
        total = self.makespan * len(self.idle)
        return sum(self.idle) / total if total else 0.0


def simulate(schedule: Schedule, costs: Costs) -> Simulation:
    """Runs the schedule on ideal ranks: a group starts when its rank is free and all that it needs has arrived.

    Everything that a group makes leaves at the group's end, the gradient of a full backward included. Sending
    takes none of the rank's time.

    Raises:
        ScheduleError: the ranks wait for each other.
    """
    starts: list[list[float]] = [[] for _ in schedule.ranks]
    ends: list[list[float]] = [[] for _ in schedule.ranks]
    made_at: dict[Value, float] = {}
    arrival = _arrivals(schedule, costs.latency, made_at)
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
                end = start + costs.duration_of(group)
                starts[rank].append(start)
                ends[rank].append(end)
                made_at.update({value: end for op in group if (value := made_by(op, schedule.num_stages)) is not None})
                moved = True
    _check_finished(schedule, ends)
    makespan = max((rank_ends[-1] for rank_ends in ends if rank_ends), default=0.0)
    busy = [sum(map(costs.duration_of, groups)) for groups in schedule.ranks]
    return Simulation(
        starts=tuple(map(tuple, starts)),
        ends=tuple(map(tuple, ends)),
        makespan=makespan,
        idle=tuple(makespan - time for time in busy),
        peaks=peak_activations(schedule),
    )


def published_idle(num_ranks: int, costs: Costs) -> float:
    """Idle time of every rank under the published DualPipe, (P/2 - 1)(F&B + B - 3W).

    F&B is the time of an overlapped pair. Source: arXiv:2412.19437, table 2.
    """
    backward = Operation(Op.BACKWARD, 1, 0, 0)
    pair = costs.duration_of((Operation(Op.FORWARD, 0, 0, 0), backward))
    return (num_ranks / 2 - 1) * (pair + costs.duration_of((backward,)) - 3 * costs.backward_weight)


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
