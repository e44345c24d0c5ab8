"""Describes a pipeline for the list builder: one slot per stage that a rank holds for a direction.

Slots are numbered over all ranks. Properties of slots are lists indexed by that number `j`. Kinds of work are numbers
too.
"""

import itertools
from collections.abc import Sequence

from dualpipe.ir import Op, Schedule
from dualpipe.simulate.costs import CostModel, overlapped_time

FORWARD, INPUT, WEIGHT = range(3)
OPS = (Op.FORWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT)
EPSILON = 1e-9


class Slots:
    """Pipeline that is to be scheduled.

    Attributes:
        directions: direction of each slot.
        stages: stage of each slot.
        ranks: rank of each slot.
        of_rank: slots of each rank.
        after: slot of the next stage, -1 if there is none.
        before: slot of the previous stage, -1 if there is none.
        counts: number of micro-batches of each slot.
        lanes: computation and exchange of F, I and W, by slot.
        weights: memory of one micro-batch's activation in each slot.
        later: slots of later stages on the same rank. They must always have room for one activation, because the
            activations of earlier stages wait for them.
        pairs: for each rank, the times of pairs that are shorter together than in sequence.
        work: computation of each rank.
    """

    def __init__(self, shape: Schedule, costs: CostModel, memory_cap: float) -> None:
        """Computes the properties of all slots.

        Args:
            shape: schedule with placement and counts; its groups are ignored.
            costs: costs of its stages.
            memory_cap: maximum of a rank's live activations, in the unit of `StageCosts.activation`.
        """
        self.shape = shape
        self.cap = memory_cap + EPSILON
        self.latency = costs.latency
        # Slots are numbered rank by rank; (rank, direction, stage) of each.
        slots = [(rank, *held) for rank in range(shape.num_ranks) for held in shape.stages_of(rank)]
        self.ranks = [rank for rank, _, _ in slots]
        self.directions = [direction for _, direction, _ in slots]
        self.stages = [stage for _, _, stage in slots]
        self.of_rank = [[j for j, slot in enumerate(slots) if slot[0] == rank] for rank in range(shape.num_ranks)]
        # Slots of the neighboring stages, on any rank.
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
        """Returns the times of the pairs of a rank's work that overlap, by `work_key` of both members."""
        times: dict[tuple[int, int], float] = {}
        works = [(j, kind) for j in held for kind in (FORWARD, INPUT, WEIGHT)]
        for one, other in itertools.product(works, works):
            lanes = [self.lanes[j][kind] for j, kind in (one, other)]
            time = overlapped_time(lanes)
            if time < sum(map(sum, lanes)) - EPSILON:
                times[work_key(*one), work_key(*other)] = time
        return times


def work_key(slot: int, kind: int) -> int:
    """Returns one number for a kind of work in a slot, which is fast to compare."""
    return 3 * slot + kind
