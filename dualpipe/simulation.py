"""Simulates the timing and the live activations of a schedule under given costs.

Orders of groups are timed with one clock per rank, advanced by groups and by values that they need. Operations are
numbers here, because optimizations time the same ones hundreds of times. Live activations depend only on the order: an
offload waits for its copy, so no copy is too slow for the memory cap.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from dualpipe.costs import CostModel, Costs, overlapped_time, uniform
from dualpipe.ir import Group, MemoryCapError, Op, Operation, Schedule, ScheduleError

_BACKWARDS = (Op.BACKWARD, Op.BACKWARD_INPUT)
_COPIES = (Op.OFFLOAD, Op.RELOAD)
_BEFORE = {
    Op.BACKWARD: (Op.RELOAD, Op.FORWARD),
    Op.BACKWARD_INPUT: (Op.RELOAD, Op.FORWARD),
    Op.BACKWARD_WEIGHT: (Op.BACKWARD_INPUT,),
    Op.OFFLOAD: (Op.FORWARD,),
    Op.RELOAD: (Op.OFFLOAD,),
}
"""Kinds of operations of the same micro-batch and stage, of which the first that exists must run before each kind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CopySpan:
    """Time span of the copy of an offload or reload between a rank's device and its host memory."""

    operation: Operation
    start: float
    end: float


NumberedGroup = tuple[int, ...]
"""Group of operations, given by their numbers in a `Timing`."""

RankGroups = Sequence[Sequence[NumberedGroup]]
"""Groups of every rank, in order."""


@dataclass(slots=True, kw_only=True)
class TimingProgress:
    """Progress of all ranks.

    Attributes:
        ends: end of each operation by number, -1 if it has not run.
        position: number of groups that each rank has run.
        left: time of each rank's remaining groups, without waits.
        copied: end of the copy to the host of each offload by number, if its forward has run.
        to_host: time from which each rank's link to its host memory is free, as `from_host` for the other direction.
    """

    ends: list[float]
    position: list[int]
    clock: list[float]
    left: list[float]
    copied: dict[int, float]
    to_host: list[float]
    from_host: list[float]

    def copy(self) -> "TimingProgress":
        """Returns an independent copy."""
        return TimingProgress(
            ends=self.ends.copy(),
            position=self.position.copy(),
            clock=self.clock.copy(),
            left=self.left.copy(),
            copied=self.copied.copy(),
            to_host=self.to_host.copy(),
            from_host=self.from_host.copy(),
        )


class Timing:
    """Numbered operations of a schedule, with their costs and dependencies, for any order of groups."""

    def __init__(self, schedule: Schedule, costs: CostModel) -> None:
        self.operations = tuple([op for groups in schedule.ranks for group in groups for op in group])
        self._numbers: dict[tuple[Op, int, int, int], int] = {op: number for number, op in enumerate(self.operations)}
        by_slice = costs.by_slice or (costs.stages,)
        lanes = {
            (kind, stage, index): (stage_costs.compute_of(kind), stage_costs.exchange_of(kind))
            for index, stages in enumerate(by_slice)
            for stage, stage_costs in enumerate(stages)
            for kind in Op
        }
        self._lanes = [lanes[op[0], op[2], op[3] % len(by_slice)] for op in self.operations]
        self._durations: dict[NumberedGroup, float] = {}
        self._known_inputs: dict[NumberedGroup, tuple[tuple[int, float], ...]] = {}
        self._alone = costs.alone
        self._needed, self._lags = self._edges(schedule, costs.latency)
        # By number: the time of each copy, and the offload that follows a forward.
        self._copies = {n: costs.copy_time_of(op) for n, op in enumerate(self.operations) if op[0] in _COPIES}
        self._before = self._predecessors()
        self._offloads = {self._before[n]: n for n in self._copies if self.operations[n].kind is Op.OFFLOAD}

    def numbered(self, groups: Iterable[Sequence[Operation]]) -> list[NumberedGroup]:
        """Converts a rank's groups to numbers."""
        numbers = self._numbers
        return [tuple([numbers[op] for op in group]) for group in groups]

    def duration(self, group: NumberedGroup) -> float:
        """Returns the time of a group; see `CostModel.duration_of`."""
        duration = self._durations.get(group)
        if duration is None:
            lanes = [self._lanes[number] for number in group]
            duration = self._durations[group] = overlapped_time(lanes, self._alone)
        return duration

    def compute(self, group: NumberedGroup) -> float:
        """Returns the computation time of a group's operations; a lone one may be faster (`CostModel.alone`)."""
        return (self._alone if len(group) == 1 else 1.0) * sum(self._lanes[number][0] for number in group)

    def begin(self, ranks: RankGroups) -> TimingProgress:
        """Returns the progress before the first group; `ranks` must contain all operations once."""
        return TimingProgress(
            ends=[-1.0] * len(self.operations),
            position=[0] * len(ranks),
            clock=[0.0] * len(ranks),
            left=[sum(map(self.duration, groups)) for groups in ranks],
            copied={},
            to_host=[0.0] * len(ranks),
            from_host=[0.0] * len(ranks),
        )

    def advance(
        self, ranks: RankGroups, progress: TimingProgress, until: int | None = None, limit: float = float("inf")
    ) -> bool:
        """Runs each rank's groups in order, each as early as possible, until ranks end or block.

        Args:
            ranks: groups of every rank; the groups that have run must be unchanged.
            until: number of groups after which every rank stops; None for all.
            limit: time by which all ranks must end; the call stops when a rank cannot, and returns False.
        """
        ends = progress.ends
        left = progress.left
        clock = progress.clock
        position = progress.position
        durations = self._durations
        duration_of = self.duration
        copies = self._copies
        known_inputs = self._known_inputs
        inputs_of = self._inputs_of
        blocked: dict[int, list[int]] = {}
        waiting = list(range(len(ranks)))[::-1]
        while waiting:
            rank = waiting.pop()
            groups = ranks[rank]
            time = clock[rank]
            for index in range(position[rank], len(groups) if until is None else min(until, len(groups))):
                group = groups[index]
                start = time
                missing = -1
                # As in `ready`, without a call for each group.
                for number, lag in known_inputs[group] if group in known_inputs else inputs_of(group):
                    arrival = ends[number]
                    if arrival < 0:
                        missing = number
                        break
                    if arrival + lag > start:
                        start = arrival + lag
                if missing >= 0:
                    blocked.setdefault(missing, []).append(rank)
                    break
                if start + left[rank] > limit:
                    return False
                duration = durations[group] if group in durations else duration_of(group)
                time = start + duration
                left[rank] -= duration
                position[rank] = index + 1
                for number in group:
                    ends[number] = time
                    if number in blocked:
                        waiting += blocked.pop(number)
                if copies:
                    time = self._run_copies(rank, group, time, progress)
            clock[rank] = time
        return True

    def _run_copies(self, rank: int, group: NumberedGroup, time: float, progress: TimingProgress) -> float:
        """Runs the copies of a group that the rank has finished at `time`, and returns when it is free."""
        first = group[0]
        if first not in self._copies:
            for number in group:
                if number in self._offloads:
                    offload = self._offloads[number]
                    progress.to_host[rank] = max(progress.to_host[rank], time) + self._copies[offload]
                    progress.copied[offload] = progress.to_host[rank]
        elif self.operations[first].kind is Op.OFFLOAD:
            time = progress.ends[first] = max(time, progress.copied[first])
        else:
            progress.ends[first] = progress.from_host[rank] = max(progress.from_host[rank], time) + self._copies[first]
        return time

    def copy_spans(self, groups: Sequence[NumberedGroup], ends: Sequence[float]) -> list[CopySpan]:
        """Returns the copies of a rank, given the ends of all operations."""
        spans: list[CopySpan] = []
        if not self._copies:
            return spans
        free = 0.0
        for number in (number for group in groups for number in group):
            if number in self._offloads:
                offload = self._offloads[number]
                start = max(free, ends[number])
                free = start + self._copies[offload]
                spans.append(CopySpan(operation=self.operations[offload], start=start, end=free))
            elif number in self._copies and self.operations[number].kind is Op.RELOAD:
                start = ends[number] - self._copies[number]
                spans.append(CopySpan(operation=self.operations[number], start=start, end=ends[number]))
        return spans

    def run(self, ranks: RankGroups) -> list[float]:
        """Returns the end of every operation by number; -1 for operations in a deadlock."""
        progress = self.begin(ranks)
        self.advance(ranks, progress)
        return progress.ends

    def ready(self, group: NumberedGroup, time: float, ends: list[float]) -> tuple[float, int]:
        """Returns the start of a group on a rank free at `time`, and -1 or an operation that must run first."""
        for number, lag in self._known_inputs.get(group) or self._inputs_of(group):
            arrival = ends[number]
            if arrival < 0:
                return time, number
            if arrival + lag > time:
                time = arrival + lag
        return time, -1

    def _inputs_of(self, group: NumberedGroup) -> tuple[tuple[int, float], ...]:
        inputs: list[tuple[int, float]] = []
        for number in group:
            if self._before[number] >= 0:  # only a reload may end after the rank is free
                inputs.append((self._before[number], 0.0))
            if self._needed[number] >= 0:
                inputs.append((self._needed[number], self._lags[number]))
        edges = self._known_inputs[group] = tuple(inputs)
        return edges

    def _edges(self, schedule: Schedule, latency: float) -> tuple[list[int], list[float]]:
        """Returns the operation of a neighboring stage that each operation needs, and the latency from it."""
        numbers = self._numbers
        last = schedule.num_stages - 1
        lags_of = [[latency if rank != after else 0.0 for rank, after in pairwise(row)] for row in schedule.placement]
        needed = []
        lags = []
        for number, (kind, direction, stage, micro_batch) in enumerate(self.operations):
            # If no operation makes the value, the operation waits for itself and never runs.
            source = None if schedule.cohorts is None else schedule.token_source(self.operations[number])
            if source is not None:
                row = schedule.placement[direction]
                needed.append(numbers.get(source, number))
                lags.append(latency if row[-1] != row[0] else 0.0)
            elif kind is Op.FORWARD and stage > 0:
                needed.append(numbers.get((kind, direction, stage - 1, micro_batch), number))
                lags.append(lags_of[direction][stage - 1])
            elif kind in _BACKWARDS and stage < last:
                backward = numbers.get((Op.BACKWARD_INPUT, direction, stage + 1, micro_batch))
                needed.append(
                    numbers.get((Op.BACKWARD, direction, stage + 1, micro_batch), number)
                    if backward is None
                    else backward
                )
                lags.append(lags_of[direction][stage])
            else:
                needed.append(-1)
                lags.append(0.0)
        return needed, lags

    def _predecessors(self) -> list[int]:
        """Returns the operation of the same micro-batch and stage that must run before each operation, or -1."""
        get = self._numbers.get
        if not self._copies:  # most schedules, which are timed hundreds of times
            return [get((_BEFORE[op[0]][-1], *op[1:]), -1) if op[0] in _BEFORE else -1 for op in self.operations]
        candidates = ([get((kind, *op[1:]), -1) for kind in _BEFORE.get(op[0], ())] for op in self.operations)
        return [next((number for number in before if number >= 0), -1) for before in candidates]


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

    def __repr__(self) -> str:
        exposed = max(self.exposed, default=0.0)
        peak = max(self.peaks, default=0.0)
        bubble = f"bubble {100 * self.bubble_fraction:.3g} %"
        return f"Simulation(makespan {self.makespan:.6g}, {bubble}, exposed {exposed:.3g}, peak {peak:.3g})"

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
                group_text = " ".join(map(str, schedule.ranks[rank][index]))
                raise ScheduleError(f"rank {rank}: {group_text} never starts: deadlock; validate the schedule first")


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
        allocated = freed = 0.0
        for kind, _, stage, _ in group:
            if kind is forward or kind is reload:
                allocated += weights[stage]
            elif kind in frees:
                freed += weights[stage]
        alive += allocated
        peak = max(peak, alive)
        alive -= freed if has_backwards else allocated
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
