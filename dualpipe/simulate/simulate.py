"""Simulates the timing and the live activations of a schedule under given costs.

The timing uses one clock per rank, advanced by groups and the values that they wait for. Live activations depend only
on the order.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dualpipe.ir import Group, MemoryCapError, Op, Schedule, ScheduleError
from dualpipe.simulate.costs import CostModel, Costs, uniform
from dualpipe.simulate.timing import NumberedGroup, Timing


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """Simulated timing and memory of a schedule. Times are in the unit of the costs.

    Attributes:
        starts: `starts[rank][group]` is the start of a group.
        ends: `ends[rank][group]` is the end of a group.
        makespan: end of the last group.
        idle: time in which each rank runs no group.
        exposed: time of each rank's groups in which nothing hides their exchange.
        peaks: peak memory of each rank, in the unit of `StageCosts.activation`.
    """

    starts: tuple[tuple[float, ...], ...]
    ends: tuple[tuple[float, ...], ...]
    makespan: float
    idle: tuple[float, ...]
    exposed: tuple[float, ...]
    peaks: tuple[float, ...]

    @property
    def bubble_fraction(self) -> float:
        """Idle time of all ranks over makespan times ranks."""
        total = self.makespan * len(self.idle)
        return sum(self.idle) / total if total else 0.0


def simulate(schedule: Schedule, costs: Costs | CostModel) -> Simulation:
    """Simulates the schedule: a group starts when its rank is free and all its inputs have arrived.

    All outputs of a group are sent at its end, including the gradient of a full backward. Sending takes no time of the
    rank.

    Args:
        schedule: a valid schedule.
        costs: costs of each stage, or of model/P if all stages are equal.

    Raises:
        ScheduleError: if ranks deadlock.
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
                raise ScheduleError(f"rank {rank}: {shown} never starts: deadlock; validate the schedule first")


def peak_activations(schedule: Schedule) -> tuple[int, ...]:
    """Returns the maximum number of live activations, each of one stage and micro-batch, on each rank.

    An activation is alive from the start of F to the end of B, or of W if the backward is split. In a forward-only
    schedule it is alive during its group.
    """
    weights = (1.0,) * schedule.num_stages
    return tuple(round(_peak(groups, weights)) for groups in schedule.ranks)


def peak_memory(schedule: Schedule, costs: CostModel) -> tuple[float, ...]:
    """Returns the peak memory of live activations on each rank, in the unit of `StageCosts.activation`."""
    weights = tuple(stage.activation for stage in costs.stages)
    return tuple(_peak(groups, weights) for groups in schedule.ranks)


def activation_cap(memory_cap: float | None, num_directions: int, costs: CostModel) -> float | None:
    """Returns the part of a memory cap that is left for activations next to the copies of the weights.

    Args:
        memory_cap: cap on activations and weights, in the unit of `StageCosts.activation`, or None.
        num_directions: directions of the schedule; a rank holds one copy of its weights for each.
        costs: costs with the memory of one copy.

    Raises:
        MemoryCapError: if the weights leave no memory.
    """
    if memory_cap is None:
        return None
    room = memory_cap - num_directions * costs.weights
    if room <= 0:
        least = num_directions * costs.weights + max(stage.activation for stage in costs.stages)
        raise MemoryCapError(
            f"{num_directions} x {costs.weights:g} of weights leave no memory for activations, the cap is "
            f"{memory_cap:g}; nearest: {least:g}",
            least,
        )
    return room


def _peak(groups: tuple[Group, ...], weights: Sequence[float]) -> float:
    """Returns a rank's peak; `weights` holds the activation of each stage."""
    forward, frees = Op.FORWARD, (Op.BACKWARD, Op.BACKWARD_WEIGHT)
    has_backwards = any(op.kind is not forward for group in groups for op in group)
    alive = peak = 0.0
    for group in groups:
        made = freed = 0.0
        for kind, _, stage, _ in group:
            if kind is forward:
                made += weights[stage]
            elif kind in frees:
                freed += weights[stage]
        alive += made
        peak = max(peak, alive)
        alive -= freed if has_backwards else made
    return peak
