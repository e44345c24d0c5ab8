"""Defines the state of an order that the list builder has built in part."""

from collections import deque
from dataclasses import dataclass, field

from dualpipe.generate.list_builder.preferences import Preferences
from dualpipe.generate.list_builder.queues import FORWARD, NONE, Pipeline
from dualpipe.ir import Group

EPSILON = 1e-9
NEVER = float("inf")


@dataclass(slots=True)
class DeliveryLink:
    """Link between two ranks.

    Attributes:
        source: rank that sends.
        waiting: messages that are not received yet, as queue and position.
        deadline: time before which the first of them must be received.
    """

    source: int
    waiting: deque[tuple[int, int]] = field(default_factory=deque)
    deadline: float = NEVER


class BuilderRank:
    """State of one rank.

    Attributes:
        queues: numbers of its queues.
        links: links that deliver to it, with their numbers.
        has_deadline: whether a message of these links may have a deadline.
        weights: waiting W as (direction, stage, micro-batch).
        alive: live activations by direction.
        free: time from which it is free.
        work_left: remaining computation.
        left: remaining operations.
        forwards_left: remaining F.
        has_backward: whether it has run an I.
        groups: groups so far.
    """

    __slots__ = (
        "alive",
        "forwards_left",
        "free",
        "groups",
        "has_backward",
        "has_deadline",
        "left",
        "links",
        "queues",
        "weights",
        "work_left",
    )

    def __init__(self, queues: list[int], work: float, count: int, num_directions: int) -> None:
        self.queues = queues
        self.links: list[tuple[int, DeliveryLink]] = []
        self.has_deadline = False
        self.weights: deque[tuple[int, int, int]] = deque()
        self.alive = [0.0] * num_directions
        self.free = 0.0
        self.work_left = work
        self.left = count
        self.forwards_left = count // 3
        self.has_backward = False
        self.groups: list[Group] = []


class PartialOrder:
    """Operations that are placed, and what the ranks may run next.

    Attributes:
        queues: all queues of F and I.
        following: position of the next operation of each queue.
        arrivals: for each queue, the time at which the input of each operation arrives.
        ranks: state of each rank.
        links: links between ranks, by number.
        reserve: memory that a direction needs so that its first block can run.
    """

    def __init__(self, pipeline: Pipeline, preferences: Preferences) -> None:
        """Starts without a placed operation.

        Args:
            preferences: block sizes and the memory that a direction leaves to the other one.
        """
        shape = pipeline.shape
        blocks = preferences.blocks(shape.num_ranks, shape.num_directions)
        self.queues = pipeline.queues(blocks)
        self.following = [0] * len(self.queues)
        self.arrivals = [[NEVER] * len(queue.stages) for queue in self.queues]
        per_rank = 2 * shape.num_directions
        self.ranks = [
            BuilderRank(list(range(rank * per_rank, (rank + 1) * per_rank)), work, count, shape.num_directions)
            for rank, (work, count) in enumerate(zip(pipeline.work, pipeline.counts, strict=True))
        ]
        self.links: dict[int, DeliveryLink] = {}
        for number, queue in enumerate(self.queues):
            for index, (stage, source) in enumerate(zip(queue.stages, queue.sources, strict=True)):
                if source != NONE and source not in self.links:
                    self.links[source] = DeliveryLink(source // 2 // shape.num_ranks)
                    self.ranks[queue.rank].links.append((source, self.links[source]))
                if queue.kind == FORWARD and stage == 0:
                    self.arrivals[number][index] = 0.0
        needed = blocks.forward * (pipeline.chunks - 1) * preferences.reserve + 1
        self.reserve = needed * max(pipeline.activations)
