"""Defines the configuration of the optimizer. No torch here."""

from dataclasses import dataclass
from typing import Annotated, Literal

from kernels.ranges import NonNegativeFloat, PositiveFloat, PositiveInt, ShareBelowOne
from train.optim.learning_rate import LR_SCHEDULES, RateSchedule


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """The configuration of AdamW.

    Attributes:
        kind: selects this class.
        learning_rate: the peak, which `schedule` scales.
        schedule: learning-rate schedule.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: of matrices; norms have none.
        clip_norm: largest global gradient norm; larger gradients are scaled down to it.
        sharding: `zero1` shards the optimizer state over the ranks that hold the same parameters (DeepSpeed);
            `replicated` keeps the whole state on each of them (torch; required for float64).
        moments: type of the moments; `float32` means float64 for float64 weights. A run may resume from a checkpoint
            with another type: bf16 rounds float32 moments, and the other direction changes nothing.
        bucket_elements: number of elements of a stage's gradients that zero1 reduces at once.
    """

    kind: Literal["adamw"]
    learning_rate: PositiveFloat
    schedule: Annotated[RateSchedule, LR_SCHEDULES]
    beta1: ShareBelowOne
    beta2: ShareBelowOne
    eps: PositiveFloat
    weight_decay: NonNegativeFloat
    clip_norm: PositiveFloat
    sharding: Literal["zero1", "replicated"]
    moments: Literal["float32", "bf16"]
    bucket_elements: PositiveInt
