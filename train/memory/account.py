"""What a prediction says of each rank, as values."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineBytes:
    """What a step's passes hold on a rank when most is alive.

    activations: kept from F to I. pending: from I to W. exchange: index tensors of dispatch and combine. transfers:
    hidden states and gradients on their way between stages and phases. inside: what the operation under way takes.
    """

    activations: int = 0
    pending: int = 0
    exchange: int = 0
    transfers: int = 0
    inside: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.activations + self.pending + self.exchange + self.transfers + self.inside


@dataclass(frozen=True, kw_only=True, slots=True)
class RankMemory:
    """The predicted peak of one pipeline rank, in bytes; data replicas are alike.

    weights, gradients, optimizer: alive all the time. weight_codes: FP8 copies of the weights, during the passes.
    batch: tokens and document masks of a step. pipeline: during the passes. update: what the optimizer step takes
    beside weights, gradients and state, when the passes are over. reserve: for what is not predicted.
    """

    pipeline_rank: int
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    weight_codes: int
    batch: int
    pipeline: PipelineBytes
    update: int
    reserve: int

    @property
    def static(self) -> int:
        """What is alive between two steps."""
        return self.weights + self.gradients + self.optimizer

    @property
    def passes(self) -> int:
        """What the passes take beside it."""
        return self.weight_codes + self.batch + self.pipeline.total

    @property
    def total(self) -> int:
        """The peak, the reserve included."""
        return self.static + max(self.passes, self.update) + self.reserve


@dataclass(frozen=True, kw_only=True, slots=True)
class JobMemory:
    """A prediction for all ranks of a pipeline. num_micro_batches: of the batch size that needs most."""

    ranks: tuple[RankMemory, ...]
    num_micro_batches: int

    @property
    def worst(self) -> RankMemory:
        """The rank that needs most; the first of several."""
        return max(self.ranks, key=lambda rank: rank.total)
