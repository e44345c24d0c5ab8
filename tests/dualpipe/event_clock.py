"""Times schedules with a queue of events: an oracle that shares no code with `dualpipe.simulation`.

It knows only the definition of a schedule. A forward needs the forward of the stage before. A gradient needs the
stage's own forward and the gradient of the stage after. W needs its I. Groups may have any number of members, ranks
any number of stages, and every stage has its own costs. A rank's link to its host memory carries one copy at a time in
each direction: copies out are queued when a forward has ended, copies back when the rank comes to their R. An O needs
the end of its copy out, and a backward that of its copy back.
"""

import heapq
from collections.abc import Iterator

from dualpipe.costs import CostModel
from dualpipe.ir import Group, Op, Operation, Schedule

Result = tuple[str, int, int, int]
"""Result of an operation, `F`, `I` or `W`, or a copy, `O` or `R`, with direction, stage and micro-batch."""

_HALVES = {
    Op.FORWARD: "F",
    Op.BACKWARD: "IW",
    Op.BACKWARD_INPUT: "I",
    Op.BACKWARD_WEIGHT: "W",
    Op.OFFLOAD: "",
    Op.RELOAD: "",
}


class EventClock:
    """Plays a schedule, event by event.

    Attributes:
        peaks: peak memory of each rank, in the unit of `StageCosts.activation`.
    """

    def __init__(self, schedule: Schedule, costs: CostModel) -> None:
        self._schedule = schedule
        self._costs = costs
        self._events: list[tuple[float, int, int, Result | None]] = []
        self._num_events = 0
        self._known: list[set[Result]] = [set() for _ in schedule.ranks]
        self._is_busy = [False] * schedule.num_ranks
        self._alive = [0.0] * schedule.num_ranks
        operations = (op for groups in schedule.ranks for group in groups for op in group)
        self._copied = {op[1:] for op in operations if op.kind is Op.OFFLOAD}
        self._link_free: dict[tuple[int, str], float] = {}
        self.ends: list[list[float]] = [[] for _ in schedule.ranks]
        self.peaks = [0.0] * schedule.num_ranks
        self._play()
        self.makespan = max((ends[-1] for ends in self.ends if ends), default=0.0)

    def _play(self) -> None:
        for rank in range(self._schedule.num_ranks):
            self._start_next(rank, 0.0)
        while self._events:
            time, _, rank, arrived = heapq.heappop(self._events)
            if arrived is None:
                self._finish(rank, time)
            else:
                self._known[rank].add(arrived)
            self._start_next(rank, time)
        for rank, groups in enumerate(self._schedule.ranks):
            assert len(self.ends[rank]) == len(groups), f"rank {rank}: group {len(self.ends[rank])} never starts"

    def _post(self, time: float, rank: int, arrived: Result | None) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (time, self._num_events, rank, arrived))

    def _start_next(self, rank: int, time: float) -> None:
        groups, index = self._schedule.ranks[rank], len(self.ends[rank])
        if self._is_busy[rank] or index == len(groups):
            return
        needed = {need for op in groups[index] for need in _needs(op, self._schedule.num_stages)}
        for op in groups[index]:
            if op.kind is Op.OFFLOAD:
                needed = {("O", *op[1:])}
            elif op.kind is Op.RELOAD:
                needed = set()
            elif op.kind is not Op.FORWARD and op[1:] in self._copied:
                needed.add(("R", *op[1:]))
        if needed <= self._known[rank]:
            self._is_busy[rank] = True
            self._alive[rank] += self._memory(groups[index], Op.FORWARD, Op.RELOAD)
            self.peaks[rank] = max(self.peaks[rank], self._alive[rank])
            self._post(time + _duration(groups[index], self._costs), rank, None)
            for op in groups[index]:
                if op.kind is Op.RELOAD:
                    self._copy("R", op, rank, time)

    def _copy(self, name: str, op: Operation, rank: int, time: float) -> None:
        """Queues a copy on the link to or from the host memory of a rank."""
        seconds = self._costs.stages[op.stage].offload
        assert seconds is not None
        end = max(time, self._link_free.get((rank, name), 0.0)) + seconds
        self._link_free[rank, name] = end
        self._post(end, rank, (name, *op[1:]))

    def _finish(self, rank: int, time: float) -> None:
        group = self._schedule.ranks[rank][len(self.ends[rank])]
        self._is_busy[rank] = False
        self._alive[rank] -= self._memory(group, Op.BACKWARD, Op.BACKWARD_WEIGHT, Op.OFFLOAD)
        self.ends[rank].append(time)
        for op in group:
            if op.kind is Op.FORWARD and op[1:] in self._copied:
                self._copy("O", op, rank, time)
            for result in _results(op):
                self._known[rank].add(result)
                for user in _users(self._schedule, result):
                    if user != rank:
                        self._post(time + self._costs.latency, user, result)

    def _memory(self, group: Group, *kinds: Op) -> float:
        return sum(self._costs.stages[op.stage].activation for op in group if op.kind in kinds)


def _needs(op: Operation, num_stages: int) -> Iterator[Result]:
    if op.kind is Op.FORWARD:
        if op.stage > 0:
            yield ("F", op.direction, op.stage - 1, op.micro_batch)
        return
    if op.kind is Op.BACKWARD_WEIGHT:
        yield ("I", op.direction, op.stage, op.micro_batch)
        return
    yield ("F", op.direction, op.stage, op.micro_batch)
    if op.stage < num_stages - 1:
        yield ("I", op.direction, op.stage + 1, op.micro_batch)


def _results(op: Operation) -> list[Result]:
    return [(half, op.direction, op.stage, op.micro_batch) for half in _HALVES[op.kind]]


def _users(schedule: Schedule, result: Result) -> Iterator[int]:
    """Yields the rank that needs the result, if another stage needs it."""
    name, direction, stage, _ = result
    next_stage = {"F": stage + 1, "I": stage - 1}.get(name, -1)
    if 0 <= next_stage < schedule.num_stages:
        yield schedule.placement[direction][next_stage]


def _duration(group: Group, costs: CostModel) -> float:
    """Returns the time of a group: both lanes work in parallel, but no member is faster than alone."""
    compute = exchange = longest = 0.0
    for op in group:
        stages = costs.by_slice[op.micro_batch % costs.slices] if costs.by_slice else costs.stages
        stage = stages[op.stage]
        computing = {"F": stage.forward, "I": stage.backward_input, "W": stage.backward_weight}
        exchanging = {"F": stage.forward_exchange, "I": stage.backward_exchange, "W": 0.0}
        alone = 0.0
        for half in _HALVES[op.kind]:
            compute += computing[half]
            exchange += exchanging[half]
            alone += computing[half] + exchanging[half]
        longest = max(longest, alone)
    return max(compute, exchange, longest)
