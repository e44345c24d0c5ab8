"""Sizes of a micro-batch on one rank, and what its phases keep. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from model.config import Computing, ModelConfig

PartName = Literal["embedding", "dense", "moe", "head"]
"""A part of a stage; a head includes all MTP modules behind it."""
PhaseKind = Literal["compute", "dispatch", "combine"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Sizes for one rank and one micro-batch, or one slice of it.

    Attributes:
        sequences: number of sequences.
        tokens: tokens of each sequence that this rank holds.
        value_bytes: bytes of a number in the model's type.
        pads_heads: whether attention's kernel reads queries, keys and values of one width.
        expert_rows: rows that arrive at this rank's experts, which receive equally many.
        num_local_experts: routed experts of a layer on this rank.
        routing: bytes of a dispatcher's index tensors, from dispatch to the end of the micro-batch.
        to_experts: bytes inside an exchange to the experts, in addition to its input and output.
        from_experts: bytes inside an exchange from the experts, in addition to its input and output.
        summing: bytes inside a sum of the gradients of each token's rows, beyond those.
        context: ranks that share each sequence.
        kept_ranks: other ranks of these whose rows are kept, 0 if rows pass around a ring.
    """

    config: ModelConfig
    computing: Computing
    device: Literal["cpu", "cuda"]
    sequences: int
    tokens: int
    value_bytes: int
    pads_heads: bool
    expert_rows: int
    num_local_experts: int
    routing: int = 0
    to_experts: int = 0
    from_experts: int = 0
    summing: int = 0
    context: int = 1
    kept_ranks: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of the micro-batch on this rank."""
        return self.sequences * self.tokens

    @property
    def wide_bytes(self) -> int:
        """Bytes of a number that needs at least float32."""
        return max(4, self.value_bytes)

    @property
    def is_fp8(self) -> bool:
        """Whether products are in FP8."""
        return self.computing.products != "own"


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseBytes:
    """Bytes of one phase of one micro-batch.

    Attributes:
        kind: a computation, or one of a block's two exchanges.
        values: results that only the run holds, until the next phase has finished.
        kept: from its forward to its backward.
        routing: from its forward to the end of the micro-batch.
        gradients: gradients of its inputs that the run holds, until the phase before has finished.
        shared: part of `gradients` for which a W of this phase or of later ones waits too.
        released: what all phases of the run keep before its backward, less what they keep after it.
        waiting: from its backward to its W.
        carried: gradients of earlier slices' rows that the backward allocates, less those that it completes.
        forward_peak: largest allocation inside the forward, above what was allocated before.
        backward_peak: the same inside the backward.
        weight_peak: the same inside W.
    """

    kind: PhaseKind = "compute"
    values: int = 0
    kept: int = 0
    routing: int = 0
    gradients: int = 0
    shared: int = 0
    released: int = 0
    waiting: int = 0
    carried: int = 0
    forward_peak: int = 0
    backward_peak: int = 0
    weight_peak: int = 0

    @property
    def lane(self) -> Literal["compute", "comm"]:
        """Lane on which the phase runs."""
        return "compute" if self.kind == "compute" else "comm"
