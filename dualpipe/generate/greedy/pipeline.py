"""Describes a pipeline in one direction for `GreedyRun`: costs by class of stages, memory and work."""

from dataclasses import replace

from dualpipe.ir import Op, Schedule
from dualpipe.simulate.costs import CostModel

_EPSILON = 1e-9


class InterleavedPipeline:
    """Pipeline in one direction that is to be scheduled, with costs and memory cap.

    Attributes:
        shape: schedule with placement and counts; its groups are ignored.
        chunks: number of chunks of a rank.
        cap: maximum of a rank's live activations.
        classes: class of each rank's chunks; stages of one class have equal costs.
        memory: memory of one activation, by class.
        lanes: computation and exchange of F, I and W, by class.
        latency: time from the end of a group to the arrival of its outputs at the next rank.
        unit: mean computation of an operation, and 1 if there is none.
        lone: mean time of an F or I alone.
    """

    def __init__(self, shape: Schedule, costs: CostModel, memory_cap: float) -> None:
        """Computes the pipeline's properties."""
        ranks = shape.num_ranks
        self.shape = shape
        self._costs = costs
        self.chunks = shape.num_stages // ranks
        self.cap = memory_cap + _EPSILON
        distinct = list(dict.fromkeys(costs.stages))
        self.classes = [[distinct.index(stage) for stage in costs.stages[rank::ranks]] for rank in range(ranks)]
        self.memory = [stage.activation for stage in distinct]
        kinds = (Op.FORWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT)
        self.lanes = [[(stage.compute_of(kind), stage.exchange_of(kind)) for kind in kinds] for stage in distinct]
        self.latency = costs.latency if ranks > 1 else 0.0
        compute = sum(stage.forward + stage.backward_input + stage.backward_weight for stage in costs.stages)
        exchange = sum(stage.forward_exchange + stage.backward_exchange for stage in costs.stages)
        self.unit = compute / 3 / len(costs.stages) or 1.0
        self.lone = self.unit + exchange / 2 / len(costs.stages)
        self.work = [
            shape.num_micro_batches * sum(lane[0] for number in held for lane in self.lanes[number])
            for held in self.classes
        ]

    def resized(self, num_micro_batches: int) -> "InterleavedPipeline":
        """Returns the pipeline for another number of micro-batches."""
        return InterleavedPipeline(
            replace(self.shape, num_micro_batches=num_micro_batches), self._costs, self.cap - _EPSILON
        )

    @property
    def room(self) -> float:
        """Number of the largest activations that fit the cap."""
        largest = max(self.memory)
        return self.cap / largest if largest else float("inf")
