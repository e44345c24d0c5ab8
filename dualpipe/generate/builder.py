"""A list builder: ranks take, at every moment at which they are free, the group of work that they prefer.

It builds orders of F, I and W for any placement and costs, within a memory cap, and gives up as soon as a rank has
lost more time than allowed: what a search needs, which tries thousands of preferences (`generate.search`). No
rank sends before its link's earlier message is taken, so no order can deadlock (`dualpipe.validate`).
"""

import itertools
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from dualpipe.generate.preferences import Preferences
from dualpipe.ir import Group, Op, Operation, Schedule
from dualpipe.simulate.costs import CostModel, overlapped_time

_F, _I, _W = range(3)
_OPS = (Op.FORWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT)
_EPSILON = 1e-9

_Member = tuple[float, int, int, int]
"""Value, kind, slot, micro-batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """An order, or how far it came.

    `time`: the makespan, or when it was given up; `ranks`: the groups, None where it was given up; `progress`:
    computation done by then, per rank; `effort`: groups that were placed, which is what an attempt costs.
    """

    time: float
    progress: float
    effort: int
    ranks: tuple[tuple[Group, ...], ...] | None


class Builder:
    """A pipeline to be scheduled. A slot is a stage that a rank holds for one direction.

    Attributes:
        directions, stages, ranks: of each slot.
        slots: of each rank.
        after, before: the slot of the next and of the previous stage, -1 where there is none.
        counts: micro-batches of each slot.
        lanes: computation and exchange of F, I and W, by slot.
        weights: what a slot's micro-batch keeps alive.
        later: the rank's slots of later stages. They must always find room: what fills a rank could not leave it.
        pairs: by rank, the times of the pairs that take less than their members one after the other.
        work: computation of each rank.
    """

    def __init__(self, shape: Schedule, costs: CostModel, memory_cap: float) -> None:
        """`shape`: placement and counts; its groups are not looked at. `memory_cap`: see `StageCosts.activation`."""
        self.shape = shape
        self.cap = memory_cap + _EPSILON
        self.latency = costs.latency
        slots = [(rank, *held) for rank in range(shape.num_ranks) for held in shape.stages_of(rank)]
        number = {slot[1:]: j for j, slot in enumerate(slots)}
        self.ranks = [rank for rank, _, _ in slots]
        self.directions = [direction for _, direction, _ in slots]
        self.stages = [stage for _, _, stage in slots]
        self.slots = [[j for j, slot in enumerate(slots) if slot[0] == rank] for rank in range(shape.num_ranks)]
        self.after = [number.get((direction, stage + 1), -1) for _, direction, stage in slots]
        self.before = [number.get((direction, stage - 1), -1) for _, direction, stage in slots]
        self.counts = [len(shape.micro_batches_of(direction)) for direction in self.directions]
        self.lanes = [
            [(costs.stages[s].compute_of(op), costs.stages[s].exchange_of(op)) for op in _OPS] for s in self.stages
        ]
        self.weights = [costs.stages[stage].activation for stage in self.stages]
        self.later = [
            [k for k in self.slots[self.ranks[j]] if self.stages[k] > self.stages[j]] for j in range(len(slots))
        ]
        self.pairs = [self._pair_times(held) for held in self.slots]
        self.work = [sum(self.counts[j] * sum(c for c, _ in self.lanes[j]) for j in held) for held in self.slots]

    def build(self, preferences: Preferences, makespan: float) -> Attempt:
        """Builds one order.

        Args:
            preferences: for as many slots as `directions` has.
            makespan: gives up when a rank can no longer end by then.
        """
        return _Run(self, preferences, makespan).run()

    def _pair_times(self, held: Sequence[int]) -> dict[tuple[int, int], float]:
        times: dict[tuple[int, int], float] = {}
        kinds = [3 * j + kind for j in held for kind in (_F, _I, _W)]
        for one, other in itertools.product(kinds, kinds):
            lanes = [self.lanes[one // 3][one % 3], self.lanes[other // 3][other % 3]]
            time = overlapped_time(lanes)
            if time < sum(map(sum, lanes)) - _EPSILON:
                times[one, other] = time
        return times


@dataclass(slots=True)
class _Flow:
    """Forwards, or backwards for inputs, by slot.

    `values` and `keys`: preferences; `arrivals`: when each micro-batch's input came or comes; `done`: how many have
    been started; `to`: the slot that takes what is made, -1 at the end.
    """

    values: list[float]
    keys: Sequence[Sequence[float]]
    to: list[int]
    origin: list[int]
    arrivals: list[list[float]]
    done: list[int]


class _Run:
    """One order as it grows."""

    def __init__(self, builder: Builder, preferences: Preferences, makespan: float) -> None:
        self._builder = builder
        self._makespan = makespan
        self._preferences = preferences
        depths = [stage / builder.shape.num_stages for stage in builder.stages]
        sides = builder.directions
        wanted, slots = preferences, range(len(depths))
        self._flows = (
            _Flow(
                values=[
                    wanted.forward + wanted.deep_forward * depths[j] + wanted.second_forward * sides[j] for j in slots
                ],
                keys=wanted.forwards,
                to=builder.after,
                origin=builder.before,
                arrivals=[[0.0] * builder.counts[j] if builder.stages[j] == 0 else [] for j in slots],
                done=[0 for _ in slots],
            ),
            _Flow(
                values=[3.0 + wanted.deep_backward * depths[j] + wanted.second_backward * sides[j] for j in slots],
                keys=wanted.backwards,
                to=builder.before,
                origin=builder.after,
                arrivals=[[] for _ in slots],
                done=[0 for _ in slots],
            ),
        )
        ranks = range(builder.shape.num_ranks)
        self._waiting: list[deque[tuple[int, int]]] = [deque() for _ in ranks]
        self._alive = [0.0 for _ in ranks]
        self._free = [0.0 for _ in ranks]
        self._work_left = list(builder.work)
        self._left = [3 * sum(builder.counts[j] for j in builder.slots[rank]) for rank in ranks]
        self._groups: list[list[Group]] = [[] for _ in ranks]
        self._events = [(0.0, rank) for rank in ranks]

    def run(self) -> Attempt:
        events, end = self._events, 0.0
        heapify(events)
        while events:
            now = events[0][0]
            woken = set()
            while events and events[0][0] <= now + _EPSILON:
                woken.add(heappop(events)[1])
            for rank in sorted(woken):
                if self._free[rank] > now + _EPSILON or not self._left[rank]:
                    continue
                if now + self._work_left[rank] > self._makespan + _EPSILON:
                    return self._attempt(now, complete=False)
                chosen = self._choose(rank, now)
                if chosen is not None:
                    end = max(end, self._start(rank, now, *chosen))
        return self._attempt(end, complete=end <= self._makespan + _EPSILON and not any(self._left))

    def _attempt(self, time: float, *, complete: bool) -> Attempt:
        progress = (sum(self._builder.work) - sum(self._work_left)) / len(self._left)
        ranks = tuple(map(tuple, self._groups)) if complete else None
        return Attempt(time=time, progress=progress, effort=sum(map(len, self._groups)), ranks=ranks)

    def _choose(self, rank: int, now: float) -> tuple[tuple[_Member, ...], float] | None:
        """The group of the highest value and its time; None where the rank has nothing to do, or rather waits."""
        members = self._available(rank, now)
        pairs = self._builder.pairs[rank]
        lanes, preferences = self._builder.lanes, self._preferences
        best: tuple[_Member, ...] = ()
        best_value, best_time = float("-inf"), 0.0
        for index, one in enumerate(members):
            if not self._is_next(one):
                continue
            compute, exchange = lanes[one[2]][one[1]]
            value = one[0] - preferences.alone * exchange
            if value > best_value:
                best, best_value, best_time = (one,), value, compute + exchange
            for other in members[index + 1 :] if pairs else ():
                time = pairs.get((3 * one[2] + one[1], 3 * other[2] + other[1]))
                if time is None or not self._fits(rank, one, other):
                    continue
                value = one[0] + other[0] + preferences.affinity[_pair_kind(one[1], other[1])]
                if value > best_value:
                    best, best_value, best_time = (one, other), value, time
        if not best or (best_value < preferences.patience and self._expects(rank, now)):
            return None
        return best, best_time

    def _available(self, rank: int, now: float) -> list[_Member]:
        """Operations that could start now; of the last stage also the second in line, which may join the first.

        Left out is what would send before its link's earlier message is taken.
        """
        members: list[_Member] = []
        limit, head, tail = now + _EPSILON, self._preferences.head, self._preferences.tail
        for j in self._builder.slots[rank]:
            for kind in (_I, _F):
                flow = self._flows[kind]
                done, arrivals, to = flow.done[j], flow.arrivals[j], flow.to[j]
                if done >= len(arrivals) or arrivals[done] > limit or (to >= 0 and flow.done[to] < done):
                    continue
                if kind == _F and not self._has_room(rank, j):
                    continue
                value = flow.values[j]
                special = done if done < head else done - self._builder.counts[j]
                if special >= -tail:
                    value += flow.keys[j][special]
                members.append((value, kind, j, done))
                if self._preferences.same_stage and to < 0 and done + 1 < len(arrivals) and arrivals[done + 1] <= limit:
                    members.append((value - 0.01, kind, j, done + 1))
        if self._waiting[rank]:
            members.append((self._preferences.weight, _W, *self._waiting[rank][0]))
        return members

    def _has_room(self, rank: int, *forwards: int) -> bool:
        """Whether the slots' forwards fit under the cap, with room left for the first of each later stage."""
        builder, done = self._builder, self._flows[_F].done
        need = self._alive[rank] + sum(builder.weights[j] for j in forwards)
        for later in builder.later[min(forwards, key=builder.stages.__getitem__)]:
            if later not in forwards and done[later] < builder.counts[later]:
                need += builder.weights[later]
        return need <= builder.cap

    def _is_next(self, member: _Member) -> bool:
        _, kind, j, micro_batch = member
        return kind == _W or micro_batch == self._flows[kind].done[j]

    def _fits(self, rank: int, one: _Member, other: _Member) -> bool:
        """Whether another may join one that is next: in the order of micro-batches, and within memory."""
        if one[1] == other[1] == _F and not self._has_room(rank, one[2], other[2]):
            return False
        return self._is_next(other) or one[1:3] == other[1:3]

    def _expects(self, rank: int, now: float) -> bool:
        """Whether something is on its way that is not here yet."""
        limit = now + _EPSILON
        return any(
            flow.done[j] < len(flow.arrivals[j]) and flow.arrivals[j][flow.done[j]] > limit
            for j in self._builder.slots[rank]
            for flow in self._flows
        )

    def _start(self, rank: int, now: float, members: Iterable[_Member], time: float) -> float:
        builder, end = self._builder, now + time
        group = []
        freed = 0.0
        for _, kind, j, micro_batch in members:
            group.append(Operation(_OPS[kind], builder.directions[j], builder.stages[j], micro_batch))
            self._work_left[rank] -= builder.lanes[j][kind][0]
            self._left[rank] -= 1
            if kind == _W:
                self._waiting[rank].popleft()
                freed += builder.weights[j]
                continue
            if kind == _F:
                self._alive[rank] += builder.weights[j]
            else:
                self._waiting[rank].append((j, micro_batch))
            self._pass_on(rank, now, end, kind, j)
        self._alive[rank] -= freed
        self._free[rank] = end
        self._groups[rank].append(tuple(group))
        heappush(self._events, (end, rank))
        return end

    def _pass_on(self, rank: int, now: float, end: float, kind: int, j: int) -> None:
        """The slot takes its input, so that its maker may send again, and what it makes arrives after `end`."""
        flow, ranks = self._flows[kind], self._builder.ranks
        flow.done[j] += 1
        if flow.origin[j] >= 0:
            heappush(self._events, (now, ranks[flow.origin[j]]))
        to = flow.to[j]
        if to >= 0:
            arrival = end if ranks[to] == rank else end + self._builder.latency
            flow.arrivals[to].append(arrival)
            heappush(self._events, (arrival, ranks[to]))
        elif kind == _F:  # after the last stage's F comes its own I
            self._flows[_I].arrivals[j].append(end)


def _pair_kind(one: int, other: int) -> int:
    """The index into `Preferences.affinity`; W is never first, as it comes last among the available."""
    return 3 + one if other == _W else one + other
