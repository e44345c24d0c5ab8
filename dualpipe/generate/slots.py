"""What a list builder knows of a pipeline: a slot for each stage that a rank holds for one direction.

Slots are numbered over all ranks, and everything known of a slot is a list by that number `j`. Kinds of work are
numbers too.
"""

import itertools
from collections.abc import Sequence

from dualpipe.ir import Op, Schedule
from dualpipe.simulate.costs import CostModel, overlapped_time

FORWARD, INPUT, WEIGHT = range(3)
OPS = (Op.FORWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT)
EPSILON = 1e-9


class Slots:
    """A pipeline to be scheduled.

    Attributes:
        directions, stages, ranks: of each slot.
        of_rank: the slots of each rank.
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
        self.cap = memory_cap + EPSILON
        self.latency = costs.latency
        # Slots are numbered rank by rank; (rank, direction, stage) of each.
        slots = [(rank, *held) for rank in range(shape.num_ranks) for held in shape.stages_of(rank)]
        self.ranks = [rank for rank, _, _ in slots]
        self.directions = [direction for _, direction, _ in slots]
        self.stages = [stage for _, _, stage in slots]
        self.of_rank = [[j for j, slot in enumerate(slots) if slot[0] == rank] for rank in range(shape.num_ranks)]
        # Neighbors along a micro-batch's way, on whatever rank they are.
        number = {(direction, stage): j for j, (_, direction, stage) in enumerate(slots)}
        self.after = [number.get((direction, stage + 1), -1) for _, direction, stage in slots]
        self.before = [number.get((direction, stage - 1), -1) for _, direction, stage in slots]
        # Work, time and memory of one micro-batch in each slot.
        self.counts = [len(shape.micro_batches_of(direction)) for direction in self.directions]
        self.lanes = [
            [(costs.stages[s].compute_of(op), costs.stages[s].exchange_of(op)) for op in OPS] for s in self.stages
        ]
        self.weights = [costs.stages[stage].activation for stage in self.stages]
        self.later = [
            [k for k in self.of_rank[self.ranks[j]] if self.stages[k] > self.stages[j]] for j in range(len(slots))
        ]
        self.pairs = [self._pair_times(held) for held in self.of_rank]
        self.work = [sum(self.counts[j] * sum(c for c, _ in self.lanes[j]) for j in held) for held in self.of_rank]

    def _pair_times(self, held: Sequence[int]) -> dict[tuple[int, int], float]:
        """Returns the times of the pairs of a rank's work that overlap at all, by `work_key` of both members."""
        times: dict[tuple[int, int], float] = {}
        works = [(j, kind) for j in held for kind in (FORWARD, INPUT, WEIGHT)]
        for one, other in itertools.product(works, works):
            lanes = [self.lanes[j][kind] for j, kind in (one, other)]
            time = overlapped_time(lanes)
            if time < sum(map(sum, lanes)) - EPSILON:
                times[work_key(*one), work_key(*other)] = time
        return times


def work_key(slot: int, kind: int) -> int:
    """Returns one number for a kind of work in a slot: a key that is quick to compare."""
    return 3 * slot + kind
