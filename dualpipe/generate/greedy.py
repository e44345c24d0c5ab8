"""Builds an order by simulation: every free rank starts the group that its policy values most.

Micro-batches pass in rounds: all of a round run chunk 0, then all run chunk 1, and so on (arXiv:2104.04473, section
2.2). All ranks use the same order, so messages of a link are sent and received in the same order. A rank only chooses
how many of the next F, the next I and the oldest W share its next group, and whether to wait.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import heappop, heappush
from itertools import product
from random import Random
from typing import NamedTuple

from dualpipe.costs import CostModel, overlapped_time
from dualpipe.generate.rendezvous import Rendezvous
from dualpipe.ir import Group, Op, Operation, Schedule

_EPSILON = 1e-9
_NEVER = float("inf")
_MOST_MEMBERS = 3
_FORWARD = 2.0
_BACKWARD = 3.0
_HURRY = 0.5
_SCARCE = 3.0
"""Additional value of a W if few activations are free."""


class Policy(NamedTuple):
    """Policy of all ranks. A rank runs the group with the highest value; an I has the value 3, an F 2.

    Attributes:
        weight: value of a W.
        exposed: penalty for exchange that nothing in the group hides, per mean time of an operation.
        second_forward: value of a second F in a group.
        second_backward: value of a second I in a group.
        wait: time for which a rank waits for an F or I to complete a group, relative to a lone operation's mean time.
        wait_idle: the same if it could run only W, relative to the time of the W.
        reserve: number of free activations (of the largest chunk) at which a W has a higher value.
        slope: decrease of the number of F that are ahead of the I, from one rank to the next.
        lead: number of the first I that no other operation of the group may delay.
        round_change: number of micro-batches by which a round is larger than the number of ranks.
        most_pending: maximum of messages on a link without a posted receive, or 0 for no maximum; see `Rendezvous`.
    """

    weight: float
    exposed: float
    second_forward: float
    second_backward: float
    wait: float
    wait_idle: float
    reserve: int
    slope: float
    lead: int
    round_change: int
    most_pending: int


POLICIES = (
    Policy(0.1, 2.0, -1.0, -5.0, 0.3, 0.9, 2, 2.0, 0, 0, 2),
    Policy(0.5, 2.0, -5.0, 2.0, 0.8, 0.3, 1, 1.5, 0, 0, 3),
    Policy(0.5, 0.5, -1.0, -1.0, 0.8, 0.9, 0, 0.5, 0, 0, 3),
    Policy(-0.1, 6.0, -5.0, 0.5, 0.5, 0.0, 1, 2.0, 0, 0, 3),
    Policy(-0.1, 1.0, -1.0, 0.0, 0.5, 0.3, 3, 0.0, 0, 0, 0),
    Policy(-1.0, 6.0, -5.0, -1.0, 0.3, 0.5, 1, 1.5, 0, 0, 2),
    Policy(-0.1, 1.0, -1.0, -5.0, 0.5, 0.9, 2, 2.0, 2, -1, 2),
    Policy(2.0, 2.0, 0.0, 0.0, 0.15, 0.3, 0, 1.5, 0, 0, 3),
    Policy(0.1, 0.0, 0.5, 0.5, 0.5, 0.5, 1, 0.0, 0, -1, 2),
    Policy(-0.1, 2.0, -5.0, 1.0, 0.5, 0.5, 0, 1.0, 1, 0, 2),
    Policy(0.1, 0.0, 0.5, 0.5, 0.5, 0.5, 1, 0.0, 0, -1, 3),
    Policy(0.1, 2.0, -1.0, 2.0, 0.3, 0.0, 1, 2.0, 2, 0, 2),
    Policy(-0.1, 6.0, -5.0, 0.5, 0.15, 0.5, 2, 1.0, 0, -1, 2),
    Policy(-0.1, 2.0, -1.0, 0.0, 0.5, 0.3, 2, 1.0, 0, 0, 3),
)
"""Policies that are good for many sizes and costs, the most useful first: a greedy selection by simulation."""

_CHOICES: dict[str, tuple[float, ...]] = {
    "weight": (-2.0, -1.0, -0.1, 0.1, 0.5, 1.0, 2.0),
    "exposed": (0.0, 0.5, 1.0, 2.0, 4.0, 6.0),
    "second_forward": (-5.0, -1.0, 0.0, 0.5, 1.0, 2.0),
    "second_backward": (-5.0, -1.0, 0.0, 0.5, 1.0, 2.0),
    "wait": (0.0, 0.15, 0.3, 0.5, 0.8),
    "wait_idle": (0.0, 0.3, 0.5, 0.9),
    "reserve": (0, 1, 2, 3),
    "slope": (0.0, 0.5, 1.0, 1.5, 2.0),
    "lead": (0, 1, 2),
    "round_change": (-1, 0, 0, 1),
    "most_pending": (0, 2, 2, 3),
}


def change(policy: Policy, random: Random) -> Policy:
    """Draws a neighboring policy with one to three other values."""
    names = random.sample(sorted(_CHOICES), random.randint(1, 3))
    return policy._replace(**{name: random.choice(_CHOICES[name]) for name in names})  # type: ignore[arg-type]


@dataclass(frozen=True)
class ChunkOrder:
    """Order of forwards and backwards, equal on all ranks. Sizes of rounds differ by at most one."""

    num_micro_batches: int
    chunks: int
    num_rounds: int

    @cached_property
    def forwards(self) -> list[tuple[int, int]]:
        """Chunk and micro-batch of each position of the forwards."""
        return self._steps(range(self.chunks))

    @cached_property
    def backwards(self) -> list[tuple[int, int]]:
        """Chunk and micro-batch of each position of the backwards."""
        return self._steps(range(self.chunks)[::-1])

    @cached_property
    def next_forward(self) -> list[int]:
        """Position of the same micro-batch's forward in the next chunk, or -1, for each position."""
        return _positions_of(self.forwards, [(chunk + 1, micro_batch) for chunk, micro_batch in self.forwards])

    @cached_property
    def next_backward(self) -> list[int]:
        """Position of the same micro-batch's backward in the chunk before, or -1, for each position."""
        return _positions_of(self.backwards, [(chunk - 1, micro_batch) for chunk, micro_batch in self.backwards])

    @cached_property
    def turn(self) -> list[int]:
        """Position of the backward in the same chunk, for each position of the forwards."""
        return _positions_of(self.backwards, self.forwards)

    def _steps(self, chunks: range) -> list[tuple[int, int]]:
        return [(chunk, micro_batch) for members in self._rounds() for chunk in chunks for micro_batch in members]

    def _rounds(self) -> list[range]:
        # Sizes differ by at most one; the larger rounds are last.
        share, rest = divmod(self.num_micro_batches, self.num_rounds)
        rounds = []
        start = 0
        for index in range(self.num_rounds):
            size = share + (index >= self.num_rounds - rest)
            rounds.append(range(start, start + size))
            start += size
        return rounds


def _positions_of(order: Sequence[tuple[int, int]], steps: Sequence[tuple[int, int]]) -> list[int]:
    """Returns the position of each step in an order, or -1 if it has none."""
    positions = {step: position for position, step in enumerate(order)}
    return [positions.get(step, -1) for step in steps]


class InterleavedPipeline:
    """Pipeline in one direction that is to be scheduled, with costs and memory cap.

    Attributes:
        classes: class of each rank's chunks; stages of one class have equal costs, `memory` and `lanes`.
        lanes: computation and exchange of F, I and W, by class.
        unit: mean computation of an operation, and 1 if there is none.
        lone: mean time of an F or I alone.
    """

    def __init__(self, shape: Schedule, costs: CostModel, memory_cap: float) -> None:
        ranks = shape.num_ranks
        self.shape = shape
        self.chunks = shape.num_stages // ranks
        self.cap = memory_cap + _EPSILON
        # Stages with equal costs are one class, so that situations repeat and their choices can be cached.
        distinct = list(dict.fromkeys(costs.stages))
        self.classes = [[distinct.index(stage) for stage in costs.stages[rank::ranks]] for rank in range(ranks)]
        self.memory = [stage.activation for stage in distinct]
        kinds = (Op.FORWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT)
        self.lanes = [[(stage.compute_of(kind), stage.exchange_of(kind)) for kind in kinds] for stage in distinct]
        self.latency = costs.latency if ranks > 1 else 0.0
        # Units that make policies independent of the scale of the costs.
        compute = sum(stage.forward + stage.backward_input + stage.backward_weight for stage in costs.stages)
        exchange = sum(stage.forward_exchange + stage.backward_exchange for stage in costs.stages)
        self.unit = compute / 3 / len(costs.stages) or 1.0
        self.lone = self.unit + exchange / 2 / len(costs.stages)
        self.work = [
            shape.num_micro_batches * sum(lane[0] for number in chunk_classes for lane in self.lanes[number])
            for chunk_classes in self.classes
        ]

    @property
    def room(self) -> float:
        """Number of the largest activations that fit the cap."""
        largest = max(self.memory)
        return self.cap / largest if largest else float("inf")


class _Choice(NamedTuple):
    """Numbers of F, I and W in a group, its time, and the computation in it."""

    forwards: int
    backwards: int
    weights: int
    time: float
    compute: float


class _Situation(NamedTuple):
    """What a rank can run now, by class of costs; `ahead` is the number of F before it must run an I."""

    forwards: tuple[int, ...]
    backwards: tuple[int, ...]
    weights: tuple[int, ...]
    ahead: int
    is_scarce: bool
    is_lead: bool


class GreedyRun:
    """Construction of one order."""

    def __init__(self, pipeline: InterleavedPipeline, order: ChunkOrder, policy: Policy) -> None:
        self._pipeline = pipeline
        self._order = order
        self._policy = policy
        self._ranked_choices: dict[_Situation, list[_Choice]] = {}
        ranks = range(pipeline.shape.num_ranks)
        total = len(order.forwards)
        # Arrival of each position's input at each rank. Inputs of the first stage are there from the start.
        self._forward_at = [[_NEVER] * total for _ in ranks]
        self._forward_at[0] = [_NEVER if chunk else 0.0 for chunk, _ in order.forwards]
        self._backward_at = [[_NEVER] * total for _ in ranks]
        # By rank: numbers of started F, I and W, free memory, time from which the rank is free, remaining computation.
        self._forwards, self._backwards, self._weights = ([0 for _ in ranks] for _ in range(3))
        self._room = [pipeline.cap for _ in ranks]
        self._free = [0.0 for _ in ranks]
        self._left = list(pipeline.work)
        self._chosen: list[list[_Choice]] = [[] for _ in ranks]
        self._events = [(0.0, rank) for rank in ranks]
        self._rendezvous = Rendezvous(len(ranks), policy.most_pending)
        # The first micro-batch of a round must reach the last chunk.
        largest_round = -(-order.num_micro_batches // order.num_rounds)
        least = (pipeline.chunks - 1) * largest_round + 1
        self._most_ahead = [max(pipeline.room - policy.slope * rank, least) for rank in ranks]
        self._scarce = policy.reserve * max(pipeline.memory)
        self.effort = 0

    def run(self, makespan: float) -> float | None:
        """Returns the makespan of the order, or None if it is stuck or exceeds the given makespan."""
        events = self._events
        while events:
            now = events[0][0]
            # All ranks with an event now, each once and in order: the result must not depend on ties in the heap.
            due = set()
            while events and events[0][0] <= now + _EPSILON:
                due.add(heappop(events)[1])
            for rank in sorted(due):
                if self._free[rank] > now + _EPSILON:
                    continue
                if now + self._left[rank] > makespan + _EPSILON:
                    return None
                self._step(rank, now)
        is_complete = all(done == len(self._order.forwards) for done in self._weights)
        return max(self._free) if is_complete else None

    def groups(self) -> tuple[tuple[Group, ...], ...]:
        """Returns the groups of every rank."""
        return tuple(tuple(self._groups_of(rank)) for rank in range(len(self._chosen)))

    def _groups_of(self, rank: int) -> Iterator[Group]:
        forwards = self._operations(rank, Op.FORWARD, self._order.forwards)
        backwards = self._operations(rank, Op.BACKWARD_INPUT, self._order.backwards)
        weights = self._operations(rank, Op.BACKWARD_WEIGHT, self._order.backwards)
        forward = backward = weight = 0
        for choice in self._chosen[rank]:
            # Choices hold numbers only; the common order says which micro-batches they are.
            starts = forward, backward, weight
            forward += choice.forwards
            backward += choice.backwards
            weight += choice.weights
            yield (
                *forwards[starts[0] : forward],
                *backwards[starts[1] : backward],
                *weights[starts[2] : weight],
            )

    def _operations(self, rank: int, kind: Op, order: Sequence[tuple[int, int]]) -> list[Operation]:
        ranks = len(self._chosen)
        return [Operation(kind, 0, chunk * ranks + rank, micro_batch) for chunk, micro_batch in order]

    def _step(self, rank: int, now: float) -> None:
        # Equal situations have equal choices, best first.
        situation = self._situation(rank, now)
        choices = self._ranked_choices.get(situation)
        if choices is None:
            choices = self._ranked_choices[situation] = self._ranked(situation)
        if not choices:
            return
        best = choices[0]
        # An incomplete group may wait for the input that completes it, or for one that is better than W alone.
        if not best.forwards or not best.backwards:
            arrival = self._next_arrival(rank, situation)
            is_idle = not best.forwards and not best.backwards
            patience = self._policy.wait_idle * best.time if is_idle else self._policy.wait * self._pipeline.lone
            if arrival - now < patience - _EPSILON:
                heappush(self._events, (arrival, rank))
                return
        # The best choice that no rank's transfers would block.
        for choice in choices:
            unblocked = self._transfer(rank, choice)
            if unblocked is not None:
                for unblocked_rank in unblocked:
                    heappush(self._events, (now, unblocked_rank))
                self._start(rank, now + choice.time, choice)
                return

    def _situation(self, rank: int, now: float) -> _Situation:
        order = self._order
        classes = self._pipeline.classes[rank]
        limit = now + _EPSILON
        arrivals = self._forward_at[rank]
        position = self._forwards[rank]
        room = self._room[rank]
        forwards: tuple[int, ...] = ()
        # At most two F, in order, whose inputs have arrived and whose activations fit.
        for index in range(position, min(position + 2, len(arrivals))):
            number = classes[order.forwards[index][0]]
            room -= self._pipeline.memory[number]
            if arrivals[index] > limit or room < 0:
                break
            forwards += (number,)
        arrivals = self._backward_at[rank]
        started = self._backwards[rank]
        backwards: tuple[int, ...] = ()
        # At most two I whose gradients have arrived.
        for index in range(started, min(started + 2, len(arrivals))):
            if arrivals[index] > limit:
                break
            backwards += (classes[order.backwards[index][0]],)
        # The oldest W whose I have run.
        oldest = self._weights[rank]
        weights = tuple(classes[chunk] for chunk, _ in order.backwards[oldest : min(oldest + 2, started)])
        ahead = self._most_ahead[rank] - (position - started)
        return _Situation(
            forwards,
            backwards,
            weights,
            ahead=-1 if ahead < 0 else min(int(ahead), 2),
            is_scarce=self._room[rank] <= self._scarce + 2 * _EPSILON,
            is_lead=started < self._policy.lead,
        )

    def _next_arrival(self, rank: int, situation: _Situation) -> float:
        arrival = _NEVER
        position = self._backwards[rank]
        if not situation.backwards and position < len(self._backward_at[rank]):
            arrival = self._backward_at[rank][position]
        position = self._forwards[rank]
        if not situation.forwards and situation.ahead > 0 and position < len(self._forward_at[rank]):
            chunk = self._order.forwards[position][0]
            if self._pipeline.memory[self._pipeline.classes[rank][chunk]] <= self._room[rank]:
                arrival = min(arrival, self._forward_at[rank][position])
        return arrival

    def _transfer(self, rank: int, choice: _Choice) -> set[int] | None:
        last = len(self._free) - 1
        if last == 0 or choice.forwards + choice.backwards == 0:
            return set()
        forwards = (choice.forwards, choice.forwards)
        backwards = (choice.backwards, choice.backwards)
        # At the ends, F of the first chunk receive nothing and F of the last chunk send nothing; I the other way round.
        if rank in (0, last):
            order = self._order
            position = self._forwards[rank]
            chunks = [chunk for chunk, _ in order.forwards[position : position + choice.forwards]]
            ends = chunks.count(0), chunks.count(self._pipeline.chunks - 1)
            forwards = len(chunks) - ends[0] * (rank == 0), len(chunks) - ends[1] * (rank == last)
            position = self._backwards[rank]
            chunks = [chunk for chunk, _ in order.backwards[position : position + choice.backwards]]
            ends = chunks.count(0), chunks.count(self._pipeline.chunks - 1)
            backwards = len(chunks) - ends[1] * (rank == last), len(chunks) - ends[0] * (rank == 0)
        return self._rendezvous.append(rank, forwards, backwards)

    def _ranked(self, situation: _Situation) -> list[_Choice]:
        # All numbers of F, I and W that are possible, at most three in a group.
        members = (situation.forwards, situation.backwards, situation.weights)
        numbers = product(*(range(len(kind) + 1) for kind in members))
        measured = [self._measured(situation, counts) for counts in numbers if 0 < sum(counts) <= _MOST_MEMBERS]
        choices = sorted(
            (choice for choice in measured if choice is not None),
            key=lambda choice: -self._value(choice, is_scarce=situation.is_scarce),
        )
        # A pair posts the receives of both members at once. If either alone would deadlock, the pair may not.
        pair = self._measured(situation, (1, 1, 0), is_useful=False) if all(members[:2]) else None
        return choices if pair is None or pair in choices else [*choices, pair]

    def _measured(self, situation: _Situation, numbers: Sequence[int], *, is_useful: bool = True) -> _Choice | None:
        """Returns the group of these numbers of F, I and W with its time, or None if it is not allowed."""
        forwards, backwards, weights = numbers
        if forwards and forwards - backwards > situation.ahead:
            return None
        kinds = (situation.forwards, situation.backwards, situation.weights)
        lanes = [
            self._pipeline.lanes[number][kind]
            for kind, (classes, count) in enumerate(zip(kinds, numbers, strict=True))
            for number in classes[:count]
        ]
        time = overlapped_time(lanes)
        alone = sum(map(sum, lanes))
        # A group that hides nothing only delays its first output.
        if is_useful and len(lanes) > 1 and time >= alone - _EPSILON:
            return None
        if is_useful and situation.is_lead and situation.backwards:
            first = sum(self._pipeline.lanes[situation.backwards[0]][1])
            if not backwards or time > first + _EPSILON:
                return None
        return _Choice(forwards, backwards, weights, time, compute=sum(lane[0] for lane in lanes))

    def _value(self, choice: _Choice, *, is_scarce: bool) -> float:
        policy = self._policy
        value = choice.weights * policy.weight
        if choice.forwards:
            value += _FORWARD + (choice.forwards - 1) * policy.second_forward
        if choice.backwards:
            value += _BACKWARD + (choice.backwards - 1) * policy.second_backward
        if choice.weights and is_scarce:
            value += _SCARCE
        exposed = choice.time - choice.compute
        return value - (policy.exposed * exposed + _HURRY * choice.time) / self._pipeline.unit

    def _start(self, rank: int, end: float, choice: _Choice) -> None:
        order = self._order
        classes = self._pipeline.classes[rank]
        memory = self._pipeline.memory
        # F allocate memory and send to the next stage; I send back; W free memory.
        for position in range(self._forwards[rank], self._forwards[rank] + choice.forwards):
            self._room[rank] -= memory[classes[order.forwards[position][0]]]
            self._send_forward(rank, position, end)
        for position in range(self._backwards[rank], self._backwards[rank] + choice.backwards):
            self._send_backward(rank, position, end)
        for position in range(self._weights[rank], self._weights[rank] + choice.weights):
            self._room[rank] += memory[classes[order.backwards[position][0]]]
        self._forwards[rank] += choice.forwards
        self._backwards[rank] += choice.backwards
        self._weights[rank] += choice.weights
        self._left[rank] -= choice.compute
        self._free[rank] = end
        self._chosen[rank].append(choice)
        self.effort += 1
        heappush(self._events, (end, rank))

    def _send_forward(self, rank: int, position: int, end: float) -> None:
        last = len(self._free) - 1
        arrival = end + self._pipeline.latency
        # The next stage is on the next rank, or on the first one in the next chunk, or the gradient begins here.
        if rank < last:
            self._forward_at[rank + 1][position] = arrival
            heappush(self._events, (arrival, rank + 1))
        elif self._order.next_forward[position] >= 0:
            self._forward_at[0][self._order.next_forward[position]] = arrival
            heappush(self._events, (arrival, 0))
        else:
            self._backward_at[rank][self._order.turn[position]] = end

    def _send_backward(self, rank: int, position: int, end: float) -> None:
        last = len(self._free) - 1
        arrival = end + self._pipeline.latency
        # The same in reverse; the first chunk on rank 0 has no receiver.
        if rank > 0:
            self._backward_at[rank - 1][position] = arrival
            heappush(self._events, (arrival, rank - 1))
        elif self._order.next_backward[position] >= 0:
            self._backward_at[last][self._order.next_backward[position]] = arrival
            heappush(self._events, (arrival, last))
