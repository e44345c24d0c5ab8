"""Defines the predicted memory of each rank."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineBytes:
    """The bytes that a step's passes hold on a rank at their peak.

    Attributes:
        activations: tensors kept from F to I.
        pending: tensors kept from I to W.
        exchange: index tensors of dispatch and combine.
        transfers: hidden states and gradients between stages and between phases.
        inside: temporary tensors of the running operation.
    """

    activations: int = 0
    pending: int = 0
    exchange: int = 0
    transfers: int = 0
    inside: int = 0

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.activations + self.pending + self.exchange + self.transfers + self.inside


@dataclass(frozen=True, kw_only=True, slots=True)
class RankMemory:
    """The predicted memory peak of one pipeline rank in bytes, equal for all data replicas.

    Attributes:
        pipeline_rank: index within the pipeline.
        parameters: number of parameters.
        weights: alive all the time.
        gradients: alive all the time.
        optimizer: optimizer state, alive all the time.
        weight_codes: FP8 copies of the weights, during the passes.
        batch: tokens and document masks of a step.
        pipeline: activations and other tensors of the passes.
        cool_down: like `pipeline`, while stages that have finished are reduced.
        update: further tensors of reductions and of the optimizer step.
        reserve: for what is not predicted.
    """

    pipeline_rank: int
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    weight_codes: int
    batch: int
    pipeline: PipelineBytes
    cool_down: PipelineBytes
    update: int
    reserve: int

    @property
    def static(self) -> int:
        """The bytes that are alive between two steps."""
        return self.weights + self.gradients + self.optimizer

    @property
    def passes(self) -> int:
        """The bytes that the passes take in addition."""
        return self.weight_codes + self.batch + self.pipeline.total

    @property
    def reducing(self) -> int:
        """The bytes that the last passes and the reductions next to them take in addition."""
        return self.weight_codes + self.batch + self.cool_down.total + self.update

    @property
    def total(self) -> int:
        """The peak, including the reserve."""
        return self.static + max(self.passes, self.reducing) + self.reserve


@dataclass(frozen=True, kw_only=True, slots=True)
class JobMemory:
    """The predicted memory of all ranks of a pipeline, and the micro-batches of the largest batch."""

    ranks: tuple[RankMemory, ...]
    num_micro_batches: int

    @property
    def worst(self) -> RankMemory:
        """The rank that needs most memory, or the first of several."""
        return max(self.ranks, key=lambda rank: rank.total)
