"""Builds orders by list scheduling: a free rank starts the group with the highest value.

It builds orders of F, I and W within a memory cap, for any number of chunks, directions and costs. A group has up to
three operations, so a W can fill the wait of an F that is overlapped with an I. The attempt stops as soon as a rank can
no longer finish in time.

No order can deadlock, even if a link holds one message (`dualpipe.validate`). A rank sends only if the previous message
of the link was received, or will be received before this one is sent: the receiver then has a deadline to post it.
"""

from dataclasses import dataclass
from heapq import heappop, heappush

from dualpipe.generate.list_builder.chooser import Candidate, GroupChoice, GroupChooser
from dualpipe.generate.list_builder.partial_order import EPSILON, NEVER, BuilderRank, PartialOrder
from dualpipe.generate.list_builder.preferences import Preset
from dualpipe.generate.list_builder.queues import FORWARD, NONE, OPS, WEIGHT, Pipeline
from dualpipe.ir import Group, Op, Operation


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """Complete order, or an attempt that was stopped.

    Attributes:
        time: the makespan, or the time at which the attempt was stopped.
        effort: number of decisions, as the cost of the attempt.
        ranks: groups of each rank, or None if the attempt was stopped.
    """

    time: float
    effort: int
    ranks: tuple[tuple[Group, ...], ...] | None


def build_order(pipeline: Pipeline, preset: Preset, makespan: float) -> Attempt:
    """Builds one order.

    Args:
        preset: values that decide between groups.
        makespan: time by which all ranks must end; the attempt stops when a rank cannot.
    """
    return _Run(pipeline, preset, makespan).run()


class _Run:
    """Construction of one order."""

    def __init__(self, pipeline: Pipeline, preset: Preset, makespan: float) -> None:
        self._pipeline = pipeline
        self._makespan = makespan
        self._order = PartialOrder(pipeline, preset.steady)
        # Parts with equal preferences share a chooser, which caches the times of groups.
        parts = (preset.warm_up, preset.steady, preset.cool_down)
        choosers = {each: GroupChooser(pipeline, self._order, each, self._wake) for each in parts}
        self._warm_up, self._steady, self._cool_down = (choosers[each] for each in parts)
        shape = pipeline.shape
        self._last = preset.cool_down_forwards(shape.num_ranks, shape.num_directions, pipeline.chunks)
        self._events = [(0.0, rank) for rank in range(pipeline.shape.num_ranks)]
        self._scheduled = set(self._events)
        self._effort = 0

    def run(self) -> Attempt:
        """Processes events in the order of time until everything is placed or a rank cannot end in time."""
        events, end = self._events, 0.0
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
        """Returns the chooser of the part in which a rank is."""
        if not state.has_backward:
            return self._warm_up
        return self._steady if state.forwards_left > self._last else self._cool_down

    def _start(self, rank: int, state: BuilderRank, now: float, choice: GroupChoice) -> float:
        """Starts a group: updates memory and work, receives its inputs and sends its outputs."""
        pipeline, group = self._pipeline, []
        for member in choice.members:
            queue = self._order.queues[member.queue]
            micro_batch = queue.micro_batches[member.position]
            group.append(Operation(OPS[member.kind], member.direction, member.stage, micro_batch))
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
            group.append(Operation(Op.BACKWARD_WEIGHT, direction, stage, micro_batch))
            state.work_left -= pipeline.computes[WEIGHT][stage]
            # Forwards of the group start before its W frees memory.
            state.alive[direction] -= pipeline.activations[stage]
        state.left -= len(group)
        state.free = choice.end
        state.groups.append(tuple(group))
        self._wake(choice.end, rank)
        return choice.end

    def _transfer(self, member: Candidate, place: int, now: float, end: float) -> None:
        """Receives an operation's input, so that its maker may send again, and sends the output at `end`."""
        if member.source != NONE:
            link = self._order.links[member.source]
            link.waiting.popleft()
            link.deadline = NEVER
            self._wake(max(now, self._order.ranks[link.source].free), link.source)
        if member.target == NONE:
            return
        arrival = end
        if member.link != NONE:
            arrival += self._pipeline.latency
            link = self._order.links[member.link]
            if link.waiting:
                link.deadline = end
                self._order.ranks[self._order.queues[member.target].rank].has_deadline = True
            link.waiting.append((member.target, place))
        self._order.arrivals[member.target][place] = arrival
        self._wake(arrival, self._order.queues[member.target].rank)

    def _wake(self, time: float, rank: int) -> None:
        """Schedules a decision of a rank."""
        if (time, rank) not in self._scheduled:
            self._scheduled.add((time, rank))
            heappush(self._events, (time, rank))
