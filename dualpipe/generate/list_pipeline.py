"""Describes a pipeline for the list builder: preferences, queues of F and I, and an order in part.

A link delivers in the order of sending. So all ranks run the F of a direction in one order, and its I too. In a block
of micro-batches, all run one chunk before the next chunk. A rank only decides how to merge its queues. Slices of a
sequence are consecutive micro-batches. Their I run in reverse, because later tokens attend to earlier ones.
"""

import json
from collections import deque
from dataclasses import dataclass, field
from math import lcm
from pathlib import Path

from dualpipe.costs import CostModel
from dualpipe.ir import Group, Op, Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """Numbers of micro-batches of one direction that run a chunk before the next chunk."""

    first: int
    forward: int
    backward: int

    def period(self, slices: int) -> int:
        """Returns the micro-batches after which blocks of F and sequences begin together again."""
        return lcm(self.forward, slices)


@dataclass(frozen=True, slots=True, kw_only=True)
class Preferences:
    """Values of operations and groups. A rank runs the group with the highest value; an I has the value 3.

    Attributes:
        filler: additional value of a W in a group with F or I.
        deep_forward: additional value of an F in the last stage relative to the first.
        deep_backward: additional value of an I in the first stage relative to the last.
        leader: additional value of the F of each direction's first micro-batch.
        alone: penalty for exchange that computation of the group does not hide, per mean operation.
        delay: penalty for waiting, per mean operation.
        patience: fraction of a W's time that a rank waits for an input instead of running the W.
        two_forwards: additional value of a group with two F, as `two_backwards` and `mixed` for others.
        reserve: share of a block for which an F leaves room in memory to the other direction.
        same_stage: whether two micro-batches of one stage may share a group where nothing is sent.
        posts_ahead: whether a rank may send while the previous message of the link is not received yet, if the receiver
            can receive it in time.
        block: steps by which a block of F is larger than the default, as `first_block` for the first one. A step is a
            sequence, or a slice if a link per rank cannot hold all slices of one.
        equal_blocks: whether I has the block size of F instead of the default.
        ahead: sequences by which a direction may be further ahead of its I than its distance from the last rank, so
            that it leaves memory to the other direction.
    """

    forward: float
    weight: float
    filler: float
    deep_forward: float
    deep_backward: float
    leader: float
    alone: float
    delay: float
    patience: float
    two_forwards: float
    two_backwards: float
    mixed: float
    reserve: float
    same_stage: bool
    posts_ahead: bool
    block: int
    first_block: int
    equal_blocks: bool
    ahead: float

    def blocks(self, shape: Schedule) -> Blocks:
        """Returns the block sizes for a pipeline."""
        size, step = default_block(shape)
        forward = max(step, size + self.block * step)
        first = max(step, forward + self.first_block * step)
        return Blocks(first=first, forward=forward, backward=forward if self.equal_blocks else size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """Preferences for the three parts of a rank's work.

    Attributes:
        warm_up: until the rank has run its first I. Only values of F and of groups of F matter.
        steady: between both. Block sizes and the reserve are those of all parts.
        cool_down: when the rank has few F left.
        cool_down_blocks: number of F per chunk that are left when the cool-down begins, in blocks of default size.
    """

    warm_up: Preferences
    steady: Preferences
    cool_down: Preferences
    cool_down_blocks: float = 0.0

    def cool_down_forwards(self, shape: Schedule) -> float:
        """Returns the number of F of both directions that a rank has left when its cool-down begins."""
        chunks = shape.num_stages // shape.num_ranks
        return self.cool_down_blocks * chunks * shape.num_directions * default_block(shape)[0]


def read_presets(text: str) -> tuple[Preset, ...]:
    """Reads presets from JSON: names of preferences, and the values of each preset, in one or three parts."""
    record = json.loads(text)
    presets = []
    for entry in record["presets"]:
        parts = [Preferences(**dict(zip(record["preferences"], row, strict=True))) for row in entry["parts"]]
        warm_up, steady, cool_down = parts if len(parts) > 1 else parts * 3
        blocks = entry["cool_down_blocks"]
        presets.append(Preset(warm_up=warm_up, steady=steady, cool_down=cool_down, cool_down_blocks=blocks))
    return tuple(presets)


def read_sliced(text: str) -> tuple[Preset, ...]:
    """Returns all presets of `read_presets`, those that suit slices first."""
    presets = read_presets(text)
    first = json.loads(text)["sliced"]
    return tuple(presets[number] for number in dict.fromkeys([*first, *range(len(presets))]))


def default_block(shape: Schedule) -> tuple[int, int]:
    """Returns the size of a block, and the steps in which it changes.

    It has as many micro-batches as a direction has ranks: the last one enters when the first is at the last rank. A
    block that is longer than the ring of ranks would wait for itself.
    """
    ranks = -(-shape.num_ranks // shape.num_directions)
    step = shape.slices if shape.slices <= ranks else 1
    return max(1, round(ranks / step)) * step, step


_TEXT = Path(__file__).with_name("presets.json").read_text("utf-8")
SLICED_PRESETS = read_sliced(_TEXT)
PRESETS = read_presets(_TEXT)
"""Presets that are good for many sizes and costs, the most useful first: a greedy selection by simulation.

`python -m bench.presets` makes such a selection.
"""


FORWARD, INPUT, WEIGHT = range(3)
OPS = (Op.FORWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT)
NONE = -1

_Order = list[tuple[int, int]]
_QueueKey = tuple[int, int, int]


@dataclass(slots=True, kw_only=True)
class OperationQueue:
    """All F, or all I, of one direction on one rank, in order. Lists have one item per operation.

    Attributes:
        stages: stage of each operation, plus the number of stages times its slice if slices have different costs.
        sources: link that delivers each operation's input, or NONE if this rank makes it or there is none.
        links: link that takes each operation's output, or NONE.
        targets: queue that needs each operation's output, or NONE; `places` are indices in it.
    """

    kind: int
    direction: int
    rank: int
    stages: list[int] = field(default_factory=list)
    micro_batches: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    links: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)


class Pipeline:
    """Shape and costs that all orders of a pipeline share. Stage s is on the rank of stage s mod P."""

    def __init__(self, shape: Schedule, costs: CostModel, memory_cap: float) -> None:
        self.shape = shape
        self.cap = memory_cap
        self.latency = costs.latency
        self.chunks = shape.num_stages // shape.num_ranks
        by_slice = costs.by_slice or (costs.stages,)
        stages = [stage for stages in by_slice for stage in stages]
        self.num_costs = len(by_slice)
        self.computes = [[stage.compute_of(op) for stage in stages] for op in OPS]
        self.exchanges = [[stage.exchange_of(op) for stage in stages] for op in OPS]
        self.activations = [stage.activation for stage in costs.stages] * self.num_costs
        self.unit = sum(map(sum, self.computes)) / (3 * len(stages)) or 1.0
        stages_of_rank = [shape.stages_of(rank) for rank in range(shape.num_ranks)]
        # Work and number of operations of each rank, to stop hopeless attempts early.
        sizes = [len(shape.micro_batches_of(direction)) for direction in range(shape.num_directions)]
        means = [sum(stage.compute_of(op) for op in OPS) for stage in costs.stages]
        self.work = [sum(sizes[d] * means[stage] for d, stage in row) for row in stages_of_rank]
        self.counts = [3 * sum(sizes[d] for d, _ in row) for row in stages_of_rank]
        self._queues: dict[Blocks, list[OperationQueue]] = {}

    def queues(self, blocks: Blocks) -> list[OperationQueue]:
        """Returns all queues for these blocks: for each rank I of each direction, then F of each direction."""
        if blocks not in self._queues:
            self._queues[blocks] = self._make_queues(blocks)
        return self._queues[blocks]

    def _make_queues(self, blocks: Blocks) -> list[OperationQueue]:
        shape = self.shape
        directions = range(self.shape.num_directions)
        orders: dict[tuple[int, int], _Order] = {}
        # I run in blocks too, with the chunks reversed.
        for direction in directions:
            count = len(shape.micro_batches_of(direction))
            orders[FORWARD, direction] = _order(count, self.chunks, blocks.first, blocks.forward)
            backwards = _order(count, self.chunks, blocks.first, blocks.backward)
            orders[INPUT, direction] = [
                (self.chunks - 1 - chunk, shape.mirrored_slice(micro_batch)) for chunk, micro_batch in backwards
            ]
        places = {key: {item: index for index, item in enumerate(order)} for key, order in orders.items()}
        queues: list[OperationQueue] = []
        numbers: dict[_QueueKey, int] = {}
        for rank in range(shape.num_ranks):
            for kind in (INPUT, FORWARD):
                for direction in directions:
                    numbers[kind, direction, rank] = len(queues)
                    order = orders[kind, direction]
                    queue = OperationQueue(kind=kind, direction=direction, rank=rank)
                    stages = [stage for way, stage in shape.stages_of(rank) if way == direction]
                    queue.stages = [stages[chunk] for chunk, _ in order]
                    queue.micro_batches = [micro_batch for _, micro_batch in order]
                    queues.append(queue)
        for queue in queues:
            self._connect(queue, numbers, places)
            if self.num_costs > 1:
                ordered = zip(queue.stages, queue.micro_batches, strict=True)
                queue.stages = [stage + number % self.num_costs * shape.num_stages for stage, number in ordered]
        return queues

    def _connect(
        self,
        queue: OperationQueue,
        numbers: dict[_QueueKey, int],
        places: dict[tuple[int, int], dict[tuple[int, int], int]],
    ) -> None:
        """Fills in where each operation's input comes from and its output goes."""
        shape = self.shape
        kind = queue.kind
        direction = queue.direction
        row = shape.placement[direction]
        top = shape.num_stages - 1
        # F go up the stages, I down.
        step, first, last = (1, 0, top) if kind == FORWARD else (-1, top, 0)
        for stage, micro_batch in zip(queue.stages, queue.micro_batches, strict=True):
            queue.sources.append(NONE if stage == first else self._link(row[stage - step], queue.rank, kind))
            if stage != last:
                to = stage + step
                queue.links.append(self._link(queue.rank, row[to], kind))
                queue.targets.append(numbers[kind, direction, row[to]])
                queue.places.append(places[kind, direction][to // shape.num_ranks, micro_batch])
                continue
            queue.links.append(NONE)
            # The last stage's F is the input of its I.
            turns = kind == FORWARD
            queue.targets.append(numbers[INPUT, direction, queue.rank] if turns else NONE)
            queue.places.append(places[INPUT, direction][self.chunks - 1, micro_batch] if turns else NONE)

    def _link(self, source: int, destination: int, kind: int) -> int:
        return NONE if source == destination else (source * self.shape.num_ranks + destination) * 2 + kind


def _order(micro_batches: int, chunks: int, first: int, block: int) -> _Order:
    """Returns the order of (chunk, micro-batch) pairs of one direction, block by block."""
    order: _Order = []
    start = 0
    size = first
    while start < micro_batches:
        end = min(start + size, micro_batches)
        order += [(chunk, micro_batch) for chunk in range(chunks) for micro_batch in range(start, end)]
        start = end
        size = block
    return order


EPSILON = 1e-9
NEVER = float("inf")


@dataclass(slots=True)
class DeliveryLink:
    """Link from rank `source`: messages to receive by queue and position, the first before `deadline`."""

    source: int
    waiting: deque[tuple[int, int]] = field(default_factory=deque)
    deadline: float = NEVER


@dataclass(slots=True, kw_only=True)
class BuilderRank:
    """State of one rank. `links` deliver to it, `weights` are waiting W, `alive` is by direction."""

    queues: list[int]
    alive: list[float]
    work_left: float
    left: int
    forwards_left: int
    links: list[tuple[int, DeliveryLink]] = field(default_factory=list)
    has_deadline: bool = False
    weights: deque[tuple[int, int, int]] = field(default_factory=deque)
    free: float = 0.0
    has_backward: bool = False
    groups: list[Group] = field(default_factory=list)


class PartialOrder:
    """Operations that are placed, and what the ranks may run next.

    `following` is the position of each queue's next operation. `reserve` is the memory that the first block of a
    direction needs.
    """

    def __init__(self, pipeline: Pipeline, preferences: Preferences) -> None:
        shape = pipeline.shape
        blocks = preferences.blocks(shape)
        self.queues = pipeline.queues(blocks)
        self.following = [0] * len(self.queues)
        self.arrivals = [[NEVER] * len(queue.stages) for queue in self.queues]
        per_rank = 2 * shape.num_directions
        self.ranks = [
            BuilderRank(
                queues=list(range(rank * per_rank, (rank + 1) * per_rank)),
                alive=[0.0] * shape.num_directions,
                work_left=work,
                left=count,
                forwards_left=count // 3,
            )
            for rank, (work, count) in enumerate(zip(pipeline.work, pipeline.counts, strict=True))
        ]
        self.links: dict[int, DeliveryLink] = {}
        for number, queue in enumerate(self.queues):
            for index, (stage, source) in enumerate(zip(queue.stages, queue.sources, strict=True)):
                if source != NONE and source not in self.links:
                    self.links[source] = DeliveryLink(source // 2 // shape.num_ranks)
                    self.ranks[queue.rank].links.append((source, self.links[source]))
                if queue.kind == FORWARD and stage % shape.num_stages == 0:
                    self.arrivals[number][index] = 0.0
        # The first block needs all chunks of its micro-batches but the last, and one sequence. `reserve` scales that.
        block = max(blocks.first, blocks.forward, shape.slices) * (pipeline.chunks - 1)
        self.first_block = block + shape.slices
        needed = max(blocks.forward, shape.slices) * (pipeline.chunks - 1) * preferences.reserve + shape.slices
        self.reserve = needed * max(pipeline.activations)
