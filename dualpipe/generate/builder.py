"""Builds orders by list scheduling: a free rank starts the group with the highest value.

It builds orders of F, I and W for any placement and costs within a memory cap. It stops as soon as a rank can no longer
finish in time, because a search tries thousands of preferences (`generate.search`). A rank sends only after the
previous message of the link was received, so no order can deadlock (`dualpipe.validate`).
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
    """Operation that could start now, and its value."""

    value: float
    kind: int
    slot: int
    micro_batch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """Complete order, or an attempt that was stopped.

    Attributes:
        time: the makespan, or the time at which the attempt was stopped.
        progress: mean computation per rank that was placed.
        effort: number of groups that were placed, as the cost of the attempt.
        ranks: groups of each rank, or None if the attempt was stopped.
    """

    time: float
    progress: float
    effort: int
    ranks: tuple[tuple[Group, ...], ...] | None


class Builder:
    """Builder of orders for one pipeline."""

    def __init__(self, shape: Schedule, costs: CostModel, memory_cap: float) -> None:
        """Prepares the builder.

        Args:
            shape: schedule with the placement and counts; its groups are ignored.
            costs: costs of its stages.
            memory_cap: maximum of a rank's live activations, in the unit of `StageCosts.activation`.
        """
        self._slots = Slots(shape, costs, memory_cap)
        self.directions = self._slots.directions

    def build(self, preferences: Preferences, makespan: float) -> Attempt:
        """Builds one order.

        Args:
            preferences: preferences for the slots of `directions`.
            makespan: time by which all ranks must end; the attempt stops when a rank cannot.
        """
        return _Run(self._slots, preferences, makespan).run()


@dataclass(slots=True)
class _PassState:
    """State of all forwards, or of all backwards for inputs, by slot.

    Attributes:
        values: value of an operation.
        keys: additional values of the first and last micro-batches.
        to: slot that receives the output, -1 at the end.
        origin: slot that makes the input, -1 at the start.
        arrivals: arrival time of each micro-batch's input, if it is known.
        done: number of started micro-batches.
    """

    values: list[float]
    keys: Sequence[Sequence[float]]
    to: list[int]
    origin: list[int]
    arrivals: list[list[float]]
    done: list[int]


class _Run:
    """Construction of one order."""

    def __init__(self, slots: Slots, preferences: Preferences, makespan: float) -> None:
        self._slots = slots
        self._makespan = makespan
        self._preferences = preferences
        depths = [stage / slots.shape.num_stages for stage in slots.stages]
        slot_range = range(len(depths))
        self._passes = (
            _PassState(
                values=preferences.forward_values(depths, slots.directions),
                keys=preferences.forwards,
                to=slots.after,
                origin=slots.before,
                # All inputs of the first stage are there from the start.
                arrivals=[[0.0] * slots.counts[j] if slots.stages[j] == 0 else [] for j in slot_range],
                done=[0 for _ in slot_range],
            ),
            _PassState(
                values=preferences.backward_values(depths, slots.directions),
                keys=preferences.backwards,
                to=slots.before,
                origin=slots.after,
                arrivals=[[] for _ in slot_range],
                done=[0 for _ in slot_range],
            ),
        )
        # By rank: waiting W as (slot, micro-batch), live activations, time from which the rank is free, remaining work
        # and operations, and the groups so far.
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
        """Processes events in the order of time until everything is placed or a rank cannot end in time."""
        events, end = self._events, 0.0
        heapify(events)
        while events:
            now = events[0][0]
            # All ranks with an event now, each once and in order: the result must not depend on ties in the heap.
            due = set()
            while events and events[0][0] <= now + EPSILON:
                due.add(heappop(events)[1])
            for rank in sorted(due):
                if self._free[rank] > now + EPSILON or not self._left[rank]:
                    continue
                # The rank would be late even without further waits.
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
        """Returns the group with the highest value and its time, or None if the rank should wait."""
        members = self._available(rank, now)
        pairs = self._slots.pairs[rank]
        lanes, preferences = self._slots.lanes, self._preferences
        best: tuple[_Candidate, ...] = ()
        best_value, best_time = float("-inf"), 0.0
        for index, one in enumerate(members):
            if not self._is_next(one):
                continue
            # As a group of one: nothing hides its exchange.
            compute, exchange = lanes[one.slot][one.kind]
            value = one.value - preferences.alone * exchange
            if value > best_value:
                best, best_value, best_time = (one,), value, compute + exchange
            # As a pair with each later candidate, if they overlap.
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
        """Returns the operations that could start now; for the last stage also the second one in line.

        Excludes operations that would send before the previous message of their link was received.
        """
        members: list[_Candidate] = []
        limit = now + EPSILON
        for j in self._slots.of_rank[rank]:
            for kind in (INPUT, FORWARD):
                state = self._passes[kind]
                done, arrivals, to = state.done[j], state.arrivals[j], state.to[j]
                # Skip if its input is missing, or the receiver has not received the previous message.
                if done >= len(arrivals) or arrivals[done] > limit or (to >= 0 and state.done[to] < done):
                    continue
                if kind == FORWARD and not self._has_room(rank, j):
                    continue
                value = state.values[j] + self._preferences.key(state.keys[j], done, self._slots.counts[j])
                members.append(_Candidate(value, kind, j, done))
                # The last stage sends nothing, so two of its micro-batches may share a group.
                if self._preferences.same_stage and to < 0 and done + 1 < len(arrivals) and arrivals[done + 1] <= limit:
                    members.append(_Candidate(value - 0.01, kind, j, done + 1))
        if self._waiting[rank]:
            members.append(_Candidate(self._preferences.weight, WEIGHT, *self._waiting[rank][0]))
        return members

    def _has_room(self, rank: int, *forwards: int) -> bool:
        """Returns whether the slots' forwards fit under the cap, with room left for one of each later stage."""
        slots, done = self._slots, self._passes[FORWARD].done
        need = self._alive[rank] + sum(slots.weights[j] for j in forwards)
        # A later stage with remaining forwards needs room for one. Else the activations that fill the rank, which wait
        # for that stage, could never be freed.
        for later in slots.later[min(forwards, key=slots.stages.__getitem__)]:
            if later not in forwards and done[later] < slots.counts[later]:
                need += slots.weights[later]
        return need <= slots.cap

    def _is_next(self, member: _Candidate) -> bool:
        """Returns whether a candidate is the next one of its slot. The second of two of one stage is not."""
        return member.kind == WEIGHT or member.micro_batch == self._passes[member.kind].done[member.slot]

    def _fits(self, rank: int, one: _Candidate, other: _Candidate) -> bool:
        """Returns whether `other` may run with `one`: micro-batches stay in order, and memory suffices."""
        if one.kind == other.kind == FORWARD and not self._has_room(rank, one.slot, other.slot):
            return False
        return self._is_next(other) or (one.kind, one.slot) == (other.kind, other.slot)

    def _expects(self, rank: int, now: float) -> bool:
        """Returns whether an input is going to arrive at the rank."""
        limit = now + EPSILON
        return any(
            state.done[j] < len(state.arrivals[j]) and state.arrivals[j][state.done[j]] > limit
            for j in self._slots.of_rank[rank]
            for state in self._passes
        )

    def _start(self, rank: int, now: float, members: Iterable[_Candidate], time: float) -> float:
        """Starts a group on its rank: updates work and memory, and sends the group's outputs."""
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
            self._transfer(rank, now, end, kind, j)
        # Forwards of the group start before its W free memory.
        self._alive[rank] -= freed
        self._free[rank] = end
        self._groups[rank].append(tuple(group))
        heappush(self._events, (end, rank))
        return end

    def _transfer(self, rank: int, now: float, end: float, kind: int, j: int) -> None:
        """Consumes the slot's input, so that its maker may send again, and sends the output at `end`."""
        state, ranks = self._passes[kind], self._slots.ranks
        state.done[j] += 1
        if state.origin[j] >= 0:
            heappush(self._events, (now, ranks[state.origin[j]]))
        to = state.to[j]
        if to >= 0:
            arrival = end if ranks[to] == rank else end + self._slots.latency
            state.arrivals[to].append(arrival)
            heappush(self._events, (arrival, ranks[to]))
        elif kind == FORWARD:  # the last stage's F is the input of its I
            self._passes[INPUT].arrivals[j].append(end)


def _pair_kind(one: int, other: int) -> int:
    """Returns the index into `Preferences.affinity`. W is never first, as it is the last candidate."""
    return 3 + one if other == WEIGHT else one + other
