"""The account of one phase."""

from dataclasses import dataclass
from typing import Literal

Lane = Literal["compute", "comm"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseBytes:
    """Bytes of one phase of one micro-batch.

    lane: where it runs. values: results that nothing but the run holds, until the next phase is through. kept: from
    its forward to its backward. routing: from its forward to the end of the micro-batch. gradients: of its inputs, that
    nothing but the run holds, until the phase before is through. waiting: from its backward to its W.
    forward_peak, backward_peak, weight_peak: the most that is alive inside, above what was alive before.
    """

    name: str
    lane: Lane
    values: int = 0
    kept: int = 0
    routing: int = 0
    gradients: int = 0
    waiting: int = 0
    forward_peak: int = 0
    backward_peak: int = 0
    weight_peak: int = 0
