"""Simulates the timing and the live activations of a schedule under given costs.

Live activations depend only on the order: an offload waits for its copy, so no copy is too slow for the memory cap.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dualpipe.ir import Group, MemoryCapError, Op, Schedule, ScheduleError
from dualpipe.simulate.costs import CostModel, Costs, uniform
from dualpipe.simulate.timing import CopySpan, NumberedGroup, Timing


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """Simulated timing and memory of a schedule. Times are in the unit of the costs.

    Attributes:
        starts: `starts[rank][group]` is the start of a group.
        ends: `ends[rank][group]` is the end of a group. A reload only starts its copy, and ends at once.
        idle: time in which each rank runs no group.
        exposed: time of each rank's groups in which nothing hides their exchange.
        peaks: peak memory of each rank, in the unit of `StageCosts.activation`; `host_peaks` in host memory.
    """

    starts: tuple[tuple[float, ...], ...]
    ends: tuple[tuple[float, ...], ...]
    makespan: float
    idle: tuple[float, ...]
    exposed: tuple[float, ...]
    peaks: tuple[float, ...]
    host_peaks: tuple[float, ...]
    copies: tuple[tuple[CopySpan, ...], ...]

    @property
    def bubble_fraction(self) -> float:
        """Idle time of all ranks over makespan times ranks."""
        total = self.makespan * len(self.idle)
        return sum(self.idle) / total if total else 0.0


def simulate(schedule: Schedule, costs: Costs | CostModel) -> Simulation:
    """Simulates the schedule: a group starts when its rank is free and all its inputs have arrived.

    All outputs of a group are sent at its end, and sending takes no time of the rank. The copy of an offload starts
    when the group of its forward has ended, and that of a reload when the previous group has ended. The copies of one
    rank in one direction run one after the other. An offload ends with its copy, and a backward starts after the copy
    of its reload.

    Raises:
        ScheduleError: if ranks deadlock, or the schedule offloads activations and the costs do not allow it.
    """
    model = uniform(costs, schedule.num_ranks, schedule.num_stages) if isinstance(costs, Costs) else costs
    timing = Timing(schedule, model)
    ranks = [timing.numbered(groups) for groups in schedule.ranks]
    ended = timing.run(ranks)
    _check_finished(schedule, ranks, ended)
    spans = [_group_spans(timing, groups, ended) for groups in ranks]
    makespan = max((rank_spans[-1][1] for rank_spans in spans if rank_spans), default=0.0)
    busy = [sum(map(timing.duration, groups)) for groups in ranks]
    computing = [sum(map(timing.compute, groups)) for groups in ranks]
    copies = tuple(tuple(timing.copy_spans(groups, ended)) for groups in ranks)
    return Simulation(
        starts=tuple(tuple(start for start, _ in rank_spans) for rank_spans in spans),
        ends=tuple(tuple(end for _, end in rank_spans) for rank_spans in spans),
        makespan=makespan,
        idle=tuple(makespan - time for time in busy),
        exposed=tuple(time - compute for time, compute in zip(busy, computing, strict=True)),
        peaks=peak_memory(schedule, model),
        host_peaks=tuple(
            peak_host_memory(groups, model) if moved else 0.0
            for groups, moved in zip(schedule.ranks, copies, strict=True)
        ),
        copies=copies,
    )


def makespan_of(schedule: Schedule, costs: CostModel) -> float:
    """Returns the makespan of `simulate` in less time."""
    timing = Timing(schedule, costs)
    ranks = [timing.numbered(groups) for groups in schedule.ranks]
    progress = timing.begin(ranks)
    timing.advance(ranks, progress)
    _check_finished(schedule, ranks, progress.ends)
    return max(progress.clock, default=0.0)


def _group_spans(timing: Timing, groups: list[NumberedGroup], ended: list[float]) -> list[tuple[float, float]]:
    """Returns start and end of each group of a rank. A copy starts when the previous group has ended."""
    spans: list[tuple[float, float]] = []
    for group in groups:
        kind = timing.operations[group[0]][0]
        end = ended[group[0]]
        if kind is Op.OFFLOAD or kind is Op.RELOAD:
            start = spans[-1][1] if spans else 0.0
            spans.append((start, end if kind is Op.OFFLOAD else start))
        else:
            spans.append((end - timing.duration(group), end))
    return spans


def _check_finished(schedule: Schedule, ranks: list[list[NumberedGroup]], ended: list[float]) -> None:
    for rank, groups in enumerate(ranks):
        for index, group in enumerate(groups):
            if ended[group[0]] < 0:
                shown = " ".join(map(str, schedule.ranks[rank][index]))
                raise ScheduleError(f"rank {rank}: {shown} never starts: deadlock; validate the schedule first")


def peak_activations(schedule: Schedule) -> tuple[int, ...]:
    """Returns the maximum number of live activations, each of one stage and micro-batch, on each rank.

    An activation is alive from the start of F to the end of B or W, except between its offload and its reload. In a
    forward-only schedule it is alive during its group.
    """
    weights = (1.0,) * schedule.num_stages
    return tuple(round(_peak(groups, weights)) for groups in schedule.ranks)


def peak_memory(schedule: Schedule, costs: CostModel) -> tuple[float, ...]:
    """Returns the peak memory of live activations on each rank, in the unit of `StageCosts.activation`."""
    weights = tuple(stage.activation for stage in costs.stages)
    return tuple(_peak(groups, weights) for groups in schedule.ranks)


def activation_cap(memory_cap: float | None, num_directions: int, costs: CostModel) -> float | None:
    """Returns the part of a memory cap that the copies of the weights leave, or raises a `MemoryCapError`."""
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
    forward = Op.FORWARD
    reload = Op.RELOAD
    frees = (Op.BACKWARD, Op.BACKWARD_WEIGHT, Op.OFFLOAD)
    has_backwards = any(op.kind is not forward for group in groups for op in group)
    alive = peak = 0.0
    for group in groups:
        made = freed = 0.0
        for kind, _, stage, _ in group:
            if kind is forward or kind is reload:
                made += weights[stage]
            elif kind in frees:
                freed += weights[stage]
        alive += made
        peak = max(peak, alive)
        alive -= freed if has_backwards else made
    return peak


def peak_host_memory(groups: Sequence[Group], costs: CostModel) -> float:
    """Returns the peak host memory of offloaded activations: from the end of F to the start of I."""
    offloaded = {op[1:] for group in groups for op in group if op.kind is Op.OFFLOAD}
    alive = peak = 0.0
    for group in groups:
        for op in group:
            if op[1:] in offloaded and op.kind is Op.FORWARD:
                alive += costs.stages[op.stage].activation
            elif op[1:] in offloaded and op.kind in (Op.BACKWARD, Op.BACKWARD_INPUT):
                alive -= costs.stages[op.stage].activation
        peak = max(peak, alive)
    return peak
