"""Builds orders by list scheduling: a free rank starts the group with the highest value.

A group has up to three operations, so a W can fill the wait of an F that is overlapped with an I. An attempt stops as
soon as a rank can no longer finish in time.

No order can deadlock with links that hold `Schedule.link_depth` messages (`dualpipe.progress`). A rank sends only if so
many messages before this one were received, or if the first of them will be received before this one is sent: the
receiver then has a deadline to post it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import NamedTuple

from dualpipe.costs import overlapped_time
from dualpipe.generate.list_pipeline import (
    EPSILON,
    FORWARD,
    NEVER,
    NONE,
    OPS,
    WEIGHT,
    BuilderRank,
    PartialOrder,
    Pipeline,
    Preferences,
    Preset,
)
from dualpipe.ir import Group, Op, Operation


class Candidate(NamedTuple):
    """Operation that could start at `arrival`, and its value."""

    queue: int
    position: int
    kind: int
    direction: int
    stage: int
    arrival: float
    value: float
    source: int
    link: int
    target: int


class GroupChoice(NamedTuple):
    """Group of F and I, possibly with a W, and its times and value."""

    members: tuple[Candidate, ...]
    has_weight: bool
    start: float
    end: float
    value: float


class GroupChooser:
    """Choice of groups by one set of preferences."""

    def __init__(
        self, pipeline: Pipeline, order: PartialOrder, preferences: Preferences, wake: Callable[[float, int], None]
    ) -> None:
        """Computes the values of operations. `wake` schedules a decision of a rank at a time."""
        self._pipeline = pipeline
        self._order = order
        self._preferences = preferences
        self._wake = wake
        self._values = self._operation_values()
        self._durations: dict[tuple[int, int], tuple[float, float]] = {}
        self._most_ahead = self._limits_ahead()
        self._num_classes = 2 * len(pipeline.activations) + 1
        self._largest = max(pipeline.activations)

    def _operation_values(self) -> tuple[list[float], list[float]]:
        preferences = self._preferences
        num_stages = self._pipeline.shape.num_stages
        # Depth in the pipeline, from 0 to 1: preferences favor F of deep stages, and I of the first ones.
        depths = [stage / num_stages for stage in range(num_stages)] * self._pipeline.num_costs
        forwards = [preferences.forward + preferences.deep_forward * depth for depth in depths]
        return forwards, [3.0 + preferences.deep_backward * (1.0 - depth) for depth in depths]

    def _limits_ahead(self) -> list[float]:
        """Returns the maximum number of live activations of each queue's direction."""
        pipeline = self._pipeline
        shape = pipeline.shape
        sequence = pipeline.chunks * shape.slices
        limits = []
        for queue in self._order.queues:
            distance = shape.num_ranks - (queue.stages[0] % shape.num_ranks if queue.stages else 0)
            limits.append(max(self._order.first_block, sequence * (distance + self._preferences.ahead)))
        return limits

    def choose(self, state: BuilderRank, now: float) -> GroupChoice | None:
        """Returns the group with the highest value, or None if the rank should wait."""
        candidates = self._candidates(state)
        best = self._best(state, now, candidates)
        if best is None or not best.members or best.start <= now + EPSILON:
            return best
        # The rank would wait: a W may fill the time.
        if state.weights:
            time = self._pipeline.computes[WEIGHT][state.weights[0][1]]
            is_short = best.start - now >= time * (1 - self._preferences.patience) - EPSILON
            if is_short and now + time < min((link.deadline for _, link in state.links), default=NEVER) - EPSILON:
                return GroupChoice(members=(), has_weight=True, start=now, end=now + time, value=0.0)
        arrivals = (candidate.arrival for candidate in candidates if candidate.arrival > now + EPSILON)
        self._wake(min(best.start, *arrivals, best.start), self._order.queues[state.queues[0]].rank)
        return None

    def _candidates(self, state: BuilderRank) -> list[Candidate]:
        """Returns the next operations of the rank's queues that have their inputs or wait for a transfer."""
        candidates: list[Candidate] = []
        values = self._values
        leader = self._preferences.leader
        activations = self._pipeline.activations
        order = self._order
        links = self._order.links
        most_waiting = self._pipeline.shape.link_depth + self._preferences.posts_ahead
        for number in state.queues:
            queue = order.queues[number]
            index = order.following[number]
            if index >= len(queue.stages):
                continue
            arrival = order.arrivals[number][index]
            if arrival == NEVER:
                continue
            source = queue.sources[index]
            link = queue.links[index]
            stage = queue.stages[index]
            # Links are queues: only their first message can be received, and few may wait.
            if source != NONE and links[source].waiting[0] != (number, index):
                continue
            if link != NONE and len(links[link].waiting) >= most_waiting:
                continue
            value = values[queue.kind][stage]
            if queue.kind == FORWARD and queue.micro_batches[index] == 0:
                value += leader
            target = queue.targets[index]
            candidates.append(
                Candidate(number, index, queue.kind, queue.direction, stage, arrival, value, source, link, target)
            )
            # No memory: an F that does not fit is no candidate.
            if queue.kind == FORWARD:
                backward = number - len(state.alive)  # I queues come before F queues
                is_ahead = index - order.following[backward] >= self._most_ahead[number]
                if is_ahead or activations[stage] > self._room(state, queue.direction):
                    candidates.pop()
                    continue
            if link == NONE == source and self._preferences.same_stage and index + 1 < len(queue.stages):
                self._add_second(candidates, number, index + 1, value - 0.01)
        return candidates

    def _add_second(self, candidates: list[Candidate], number: int, index: int, value: float) -> None:
        """Adds the second operation of a queue whose first one neither receives nor sends."""
        queue = self._order.queues[number]
        arrival = self._order.arrivals[number][index]
        if arrival == NEVER or queue.links[index] != NONE or queue.sources[index] != NONE:
            return
        slices = self._pipeline.shape.slices
        if queue.micro_batches[index] // slices == queue.micro_batches[index - 1] // slices:
            return  # a slice runs after the other slices of its sequence
        stage = queue.stages[index]
        target = queue.targets[index]
        candidates.append(
            Candidate(number, index, queue.kind, queue.direction, stage, arrival, value, NONE, NONE, target)
        )

    def _best(self, state: BuilderRank, now: float, candidates: list[Candidate]) -> GroupChoice | None:
        following = self._order.following
        better = self._better
        # W alone, then each candidate alone, then pairs, each without and with a W.
        best = better(None, state, now, (), 0) if state.weights else None
        for number, first in enumerate(candidates):
            if first.position != following[first.queue]:
                continue
            is_forward = first.kind == FORWARD
            best = better(best, state, now, (first,), is_forward)
            for second in candidates[number + 1 :]:
                if second.queue != first.queue:
                    if second.position != following[second.queue]:
                        continue
                    if first.link == second.link != NONE or first.source == second.source != NONE:
                        continue
                forwards = is_forward + (second.kind == FORWARD)
                if forwards < 2 or self._fit_together(state, first, second):
                    best = better(best, state, now, (first, second), forwards)
        return best

    def _better(
        self, best: GroupChoice | None, state: BuilderRank, now: float, members: tuple[Candidate, ...], forwards: int
    ) -> GroupChoice | None:
        """Returns the group of these members, without or with a W, if it is possible and has a higher value."""
        preferences = self._preferences
        start = now
        value = 0.0
        key = 0
        for member in members:
            value += member.value
            key = key * self._num_classes + member.stage * 2 + member.kind + 1
            if member.arrival > start:
                start = member.arrival
        if len(members) == 2:
            value += (preferences.two_backwards, preferences.mixed, preferences.two_forwards)[forwards]
        if start > now:
            value -= preferences.delay * (start - now) / self._pipeline.unit
        # Times depend on kinds and stages only, so they are cached by a number for the members.
        weight = state.weights[0][1] if state.weights else NONE
        for member_weight in (NONE, weight) if members and weight != NONE else (NONE if members else weight,):
            duration = self._durations.get((key, member_weight))
            time, penalty = duration or self._duration(key, member_weight, members)
            total = value - penalty
            if best is not None and total <= best.value + 1e-12:
                continue
            end = start + time
            if self._can_send(members, end) and (not state.has_deadline or self._keeps_deadlines(state, members, end)):
                best = GroupChoice(members, member_weight != NONE, start, end, total)
        return best

    def _duration(self, key: int, weight: int, members: tuple[Candidate, ...]) -> tuple[float, float]:
        """Returns the time of a group, and the penalty for its exposed exchange less the value of its W."""
        preferences = self._preferences
        computes = self._pipeline.computes
        exchanges = self._pipeline.exchanges
        lanes = [(computes[member.kind][member.stage], exchanges[member.kind][member.stage]) for member in members]
        penalty = 0.0
        if weight != NONE:
            lanes.append((computes[WEIGHT][weight], 0.0))
            penalty -= preferences.weight + (preferences.filler if members else 0.0)
        time = overlapped_time(lanes)
        penalty += preferences.alone * (time - sum(compute for compute, _ in lanes)) / self._pipeline.unit
        self._durations[key, weight] = time, penalty
        return time, penalty

    def _fit_together(self, state: BuilderRank, first: Candidate, second: Candidate) -> bool:
        """Returns whether two F fit under the cap together. Each fits alone."""
        weights = self._pipeline.activations
        both = weights[first.stage] + weights[second.stage]
        if first.direction == second.direction:
            return both <= self._room(state, first.direction)
        return both <= self._pipeline.cap - sum(state.alive) + EPSILON

    def _room(self, state: BuilderRank, direction: int) -> float:
        """Returns the memory for F of a direction: what is free, except what the other direction still needs."""
        free = self._pipeline.cap - sum(state.alive) + EPSILON
        if len(state.alive) == 1:
            return free
        opposite = 1 - direction
        number = state.queues[2 + opposite]
        left = len(self._order.queues[number].stages) - self._order.following[number]
        if not left:
            return free
        return free - max(0.0, min(self._order.reserve - state.alive[opposite], left * self._largest))

    def _can_send(self, members: tuple[Candidate, ...], end: float) -> bool:
        """Returns whether the receivers can take the first message of each full link before `end`."""
        depth = self._pipeline.shape.link_depth
        for member in members:
            if member.link != NONE and len(self._order.links[member.link].waiting) >= depth:
                receiver = self._order.ranks[self._order.queues[member.target].rank]
                if receiver.free > end - EPSILON:
                    return False
        return True

    def _keeps_deadlines(self, state: BuilderRank, members: tuple[Candidate, ...], end: float) -> bool:
        state.has_deadline = any(link.deadline < NEVER for _, link in state.links)
        for number, link in state.links:
            if end > link.deadline - EPSILON and all(member.source != number for member in members):
                return False
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """Order of each rank's groups, None if the attempt was stopped; `effort` is the number of decisions."""

    time: float
    effort: int
    ranks: tuple[tuple[Group, ...], ...] | None


def build_order(pipeline: Pipeline, preset: Preset, makespan: float) -> Attempt:
    """Builds one order. The attempt stops when a rank cannot end by `makespan`."""
    return _Run(pipeline, preset, makespan).run()


class _Run:
    def __init__(self, pipeline: Pipeline, preset: Preset, makespan: float) -> None:
        self._pipeline = pipeline
        self._makespan = makespan
        self._order = PartialOrder(pipeline, preset.steady)
        # Parts with equal preferences share a chooser, which caches the times of groups.
        parts = (preset.warm_up, preset.steady, preset.cool_down)
        choosers = {part: GroupChooser(pipeline, self._order, part, self._wake) for part in parts}
        self._warm_up, self._steady, self._cool_down = (choosers[part] for part in parts)
        self._last = preset.cool_down_forwards(pipeline.shape)
        self._events = [(0.0, rank) for rank in range(pipeline.shape.num_ranks)]
        self._scheduled = set(self._events)
        self._effort = 0

    def run(self) -> Attempt:
        """Processes events in the order of time until everything is placed or a rank cannot end in time."""
        events = self._events
        end = 0.0
        while events:
            now, rank = event = heappop(events)
            self._scheduled.discard(event)
            state = self._order.ranks[rank]
            if state.free > now + EPSILON or not state.left:
                continue
            # The rank would be late even without further waits.
            if now + state.work_left > self._makespan + EPSILON:
                return Attempt(time=now, effort=self._effort, ranks=None)
            self._effort += 1
            choice = self._chooser_of(state).choose(state, now)
            if choice is not None:
                end = max(end, self._start(rank, state, now, choice))
        is_complete = not any(state.left for state in self._order.ranks)
        ranks = tuple(tuple(state.groups) for state in self._order.ranks) if is_complete else None
        return Attempt(time=end, effort=self._effort, ranks=ranks)

    def _chooser_of(self, state: BuilderRank) -> GroupChooser:
        if not state.has_backward:
            return self._warm_up
        return self._steady if state.forwards_left > self._last else self._cool_down

    def _start(self, rank: int, state: BuilderRank, now: float, choice: GroupChoice) -> float:
        pipeline = self._pipeline
        num_stages = pipeline.shape.num_stages
        group = []
        # F allocate, I queue their W; outputs leave at the end of the group.
        for member in choice.members:
            queue = self._order.queues[member.queue]
            micro_batch = queue.micro_batches[member.position]
            group.append(Operation(OPS[member.kind], member.direction, member.stage % num_stages, micro_batch))
            self._order.following[member.queue] += 1
            state.work_left -= pipeline.computes[member.kind][member.stage]
            if member.kind == FORWARD:
                state.alive[member.direction] += pipeline.activations[member.stage]
                state.forwards_left -= 1
            else:
                state.has_backward = True
                state.weights.append((member.direction, member.stage, micro_batch))
            self._transfer(member, queue.places[member.position], now, choice.end)
        if choice.has_weight:
            direction, stage, micro_batch = state.weights.popleft()
            group.append(Operation(Op.BACKWARD_WEIGHT, direction, stage % num_stages, micro_batch))
            state.work_left -= pipeline.computes[WEIGHT][stage]
            # Forwards of the group start before its W frees memory.
            state.alive[direction] -= pipeline.activations[stage]
        state.left -= len(group)
        state.free = choice.end
        state.groups.append(tuple(group))
        self._wake(choice.end, rank)
        return choice.end

    def _transfer(self, member: Candidate, position: int, now: float, end: float) -> None:
        """Receives an operation's input, so that its maker may send again, and sends the output at `end`."""
        if member.source != NONE:
            # The receive is posted, so the sender may send its next message.
            link = self._order.links[member.source]
            link.waiting.popleft()
            link.deadline = NEVER
            self._wake(max(now, self._order.ranks[link.source].free), link.source)
        if member.target == NONE:
            return
        arrival = end
        if member.link != NONE:
            # A message more than a link holds needs the receiver to post the first one until then.
            arrival += self._pipeline.latency
            link = self._order.links[member.link]
            if len(link.waiting) >= self._pipeline.shape.link_depth:
                link.deadline = end
                self._order.ranks[self._order.queues[member.target].rank].has_deadline = True
            link.waiting.append((member.target, position))
        self._order.arrivals[member.target][position] = arrival
        self._wake(arrival, self._order.queues[member.target].rank)

    def _wake(self, time: float, rank: int) -> None:
        if (time, rank) not in self._scheduled:
            self._scheduled.add((time, rank))
            heappush(self._events, (time, rank))
