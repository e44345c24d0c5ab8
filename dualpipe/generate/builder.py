"""A list builder: whenever a rank is free, it takes the group of work that it prefers.

It builds orders of F, I and W for any placement and costs, within a memory cap. It gives up as soon as a rank has lost
more time than allowed, because a search tries thousands of preferences (`generate.search`). No rank sends before its
link's earlier message is taken, so no order can deadlock (`dualpipe.validate`).
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import NamedTuple

from dualpipe.generate.preferences import Preferences
from dualpipe.generate.slots import EPSILON, FORWARD, INPUT, OPS, WEIGHT, Slots, work_key
from dualpipe.ir import Group, Operation, Schedule
from dualpipe.simulate.costs import CostModel


class _Candidate(NamedTuple):
    """An operation that could start, and what it is worth to the rank."""

    value: float
    kind: int
    slot: int
    micro_batch: int


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
    """Builds orders for one pipeline."""

    def __init__(self, shape: Schedule, costs: CostModel, memory_cap: float) -> None:
        """`shape`: placement and counts; its groups are not looked at. `memory_cap`: see `StageCosts.activation`."""
        self._slots = Slots(shape, costs, memory_cap)
        self.directions = self._slots.directions

    def build(self, preferences: Preferences, makespan: float) -> Attempt:
        """Builds one order.

        Args:
            preferences: for as many slots as `directions` has.
            makespan: gives up when a rank can no longer end by then.
        """
        return _Run(self._slots, preferences, makespan).run()


@dataclass(slots=True)
class _PassState:
    """Forwards, or backwards for inputs, by slot.

    `values`: what an operation is worth; `keys`: what the first and last micro-batches are worth besides; `arrivals`:
    when each micro-batch's input arrived or will; `done`: how many have been started; `to`: the slot that takes what is
    made, -1 at the end; `origin`: the slot that makes the input, -1 at the start.
    """

    values: list[float]
    keys: Sequence[Sequence[float]]
    to: list[int]
    origin: list[int]
    arrivals: list[list[float]]
    done: list[int]


class _Run:
    """One order as it grows."""

    def __init__(self, slots: Slots, preferences: Preferences, makespan: float) -> None:
        self._slots = slots
        self._makespan = makespan
        self._preferences = preferences
        depths = [stage / slots.shape.num_stages for stage in slots.stages]
        every = range(len(depths))
        self._flows = (
            _PassState(
                values=preferences.forward_values(depths, slots.directions),
                keys=preferences.forwards,
                to=slots.after,
                origin=slots.before,
                # All inputs of the first stage are there from the start.
                arrivals=[[0.0] * slots.counts[j] if slots.stages[j] == 0 else [] for j in every],
                done=[0 for _ in every],
            ),
            _PassState(
                values=preferences.backward_values(depths, slots.directions),
                keys=preferences.backwards,
                to=slots.before,
                origin=slots.after,
                arrivals=[[] for _ in every],
                done=[0 for _ in every],
            ),
        )
        # By rank: W that wait (slot, micro-batch), live activations, the time from which it is free, work and
        # operations left, and the groups so far.
        ranks = range(slots.shape.num_ranks)
        self._waiting: list[deque[tuple[int, int]]] = [deque() for _ in ranks]
        self._alive = [0.0 for _ in ranks]
        self._free = [0.0 for _ in ranks]
        self._work_left = list(slots.work)
        self._left = [3 * sum(slots.counts[j] for j in slots.of_rank[rank]) for rank in ranks]
        self._groups: list[list[Group]] = [[] for _ in ranks]
        # Times at which a rank may find something new to start.
        self._events = [(0.0, rank) for rank in ranks]

    def run(self) -> Attempt:
        """Moves a clock from event to event until everything is placed or the makespan must be missed."""
        events, end = self._events, 0.0
        heapify(events)
        while events:
            now = events[0][0]
            # All ranks of this moment, each once, in order: the result must not depend on the heap's ties.
            woken = set()
            while events and events[0][0] <= now + EPSILON:
                woken.add(heappop(events)[1])
            for rank in sorted(woken):
                if self._free[rank] > now + EPSILON or not self._left[rank]:
                    continue
                # A rank that computes from now on without a pause would still be late.
                if now + self._work_left[rank] > self._makespan + EPSILON:
                    return self._attempt(now, complete=False)
                chosen = self._choose(rank, now)
                if chosen is not None:
                    end = max(end, self._start(rank, now, *chosen))
        return self._attempt(end, complete=end <= self._makespan + EPSILON and not any(self._left))

    def _attempt(self, time: float, *, complete: bool) -> Attempt:
        progress = (sum(self._slots.work) - sum(self._work_left)) / len(self._left)
        ranks = tuple(map(tuple, self._groups)) if complete else None
        return Attempt(time=time, progress=progress, effort=sum(map(len, self._groups)), ranks=ranks)

    def _choose(self, rank: int, now: float) -> tuple[tuple[_Candidate, ...], float] | None:
        """The group of the highest value and its time; None where the rank has nothing to do, or rather waits."""
        members = self._available(rank, now)
        pairs = self._slots.pairs[rank]
        lanes, preferences = self._slots.lanes, self._preferences
        best: tuple[_Candidate, ...] = ()
        best_value, best_time = float("-inf"), 0.0
        for index, one in enumerate(members):
            if not self._is_next(one):
                continue
            # Alone, nothing hides its exchange.
            compute, exchange = lanes[one.slot][one.kind]
            value = one.value - preferences.alone * exchange
            if value > best_value:
                best, best_value, best_time = (one,), value, compute + exchange
            # With each later member, if they overlap.
            for other in members[index + 1 :] if pairs else ():
                time = pairs.get((work_key(one.slot, one.kind), work_key(other.slot, other.kind)))
                if time is None or not self._fits(rank, one, other):
                    continue
                value = one.value + other.value + preferences.affinity[_pair_kind(one.kind, other.kind)]
                if value > best_value:
                    best, best_value, best_time = (one, other), value, time
        if not best or (best_value < preferences.patience and self._expects(rank, now)):
            return None
        return best, best_time

    def _available(self, rank: int, now: float) -> list[_Candidate]:
        """Operations that could start now; of the last stage also the second in line, which may join the first.

        Left out is what would send before its link's earlier message is taken.
        """
        members: list[_Candidate] = []
        limit = now + EPSILON
        for j in self._slots.of_rank[rank]:
            for kind in (INPUT, FORWARD):
                flow = self._flows[kind]
                done, arrivals, to = flow.done[j], flow.arrivals[j], flow.to[j]
                # Its input is missing, or the receiver has not yet taken the message before.
                if done >= len(arrivals) or arrivals[done] > limit or (to >= 0 and flow.done[to] < done):
                    continue
                if kind == FORWARD and not self._has_room(rank, j):
                    continue
                value = flow.values[j] + self._preferences.key(flow.keys[j], done, self._slots.counts[j])
                members.append(_Candidate(value, kind, j, done))
                # The last stage sends nothing, so two of its micro-batches may share a group.
                if self._preferences.same_stage and to < 0 and done + 1 < len(arrivals) and arrivals[done + 1] <= limit:
                    members.append(_Candidate(value - 0.01, kind, j, done + 1))
        if self._waiting[rank]:
            members.append(_Candidate(self._preferences.weight, WEIGHT, *self._waiting[rank][0]))
        return members

    def _has_room(self, rank: int, *forwards: int) -> bool:
        """Returns whether the slots' forwards fit under the cap, with room left for the first of each later stage."""
        slots, done = self._slots, self._flows[FORWARD].done
        need = self._alive[rank] + sum(slots.weights[j] for j in forwards)
        # A later stage with forwards to come needs room for one, or what fills the rank could never leave it.
        for later in slots.later[min(forwards, key=slots.stages.__getitem__)]:
            if later not in forwards and done[later] < slots.counts[later]:
                need += slots.weights[later]
        return need <= slots.cap

    def _is_next(self, member: _Candidate) -> bool:
        """Returns whether a member is the first in line of its flow; of two of one stage, the second is not."""
        return member.kind == WEIGHT or member.micro_batch == self._flows[member.kind].done[member.slot]

    def _fits(self, rank: int, one: _Candidate, other: _Candidate) -> bool:
        """Returns whether another may join one that is next: in the order of micro-batches, and within memory."""
        if one.kind == other.kind == FORWARD and not self._has_room(rank, one.slot, other.slot):
            return False
        return self._is_next(other) or (one.kind, one.slot) == (other.kind, other.slot)

    def _expects(self, rank: int, now: float) -> bool:
        """Returns whether something is on its way that is not here yet."""
        limit = now + EPSILON
        return any(
            flow.done[j] < len(flow.arrivals[j]) and flow.arrivals[j][flow.done[j]] > limit
            for j in self._slots.of_rank[rank]
            for flow in self._flows
        )

    def _start(self, rank: int, now: float, members: Iterable[_Candidate], time: float) -> float:
        """Places a group on its rank: counts work and memory, and sends on what the group makes."""
        slots, end = self._slots, now + time
        group = []
        freed = 0.0
        for _, kind, j, micro_batch in members:
            group.append(Operation(OPS[kind], slots.directions[j], slots.stages[j], micro_batch))
            self._work_left[rank] -= slots.lanes[j][kind][0]
            self._left[rank] -= 1
            if kind == WEIGHT:
                self._waiting[rank].popleft()
                freed += slots.weights[j]
                continue
            if kind == FORWARD:
                self._alive[rank] += slots.weights[j]
            else:
                self._waiting[rank].append((j, micro_batch))
            self._pass_on(rank, now, end, kind, j)
        # Forwards of the group begin before its W free anything.
        self._alive[rank] -= freed
        self._free[rank] = end
        self._groups[rank].append(tuple(group))
        heappush(self._events, (end, rank))
        return end

    def _pass_on(self, rank: int, now: float, end: float, kind: int, j: int) -> None:
        """The slot takes its input, so that its maker may send again, and what it makes arrives after `end`."""
        flow, ranks = self._flows[kind], self._slots.ranks
        flow.done[j] += 1
        if flow.origin[j] >= 0:
            heappush(self._events, (now, ranks[flow.origin[j]]))
        to = flow.to[j]
        if to >= 0:
            arrival = end if ranks[to] == rank else end + self._slots.latency
            flow.arrivals[to].append(arrival)
            heappush(self._events, (arrival, ranks[to]))
        elif kind == FORWARD:  # the last stage's F is followed by its own I
            self._flows[INPUT].arrivals[j].append(end)


def _pair_kind(one: int, other: int) -> int:
    """Returns the index into `Preferences.affinity`; W is never first, as it comes last among the available."""
    return 3 + one if other == WEIGHT else one + other
