"""The optimizer of a run, as a value. No torch here."""

from dataclasses import dataclass
from typing import Annotated, Literal

from kernels.ranges import NonNegativeFloat, PositiveFloat, PositiveInt, ShareBelowOne
from train.optim.learning_rate import LR_SCHEDULES, RateSchedule


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW.

    Attributes:
        learning_rate: the peak, which `schedule` scales.
        schedule: the course of the learning rate.
        sharding: `zero1` shards the optimizer state over the ranks that hold the same parameters (DeepSpeed),
            `replicated` keeps it whole on each of them (torch; the only one for float64).
        moments: their type (float32: float64 for float64 weights). A run may resume from a checkpoint with another
            one: from float32 to bf16 moments are rounded, the other direction changes nothing.
        bucket_elements: how much of the gradients zero1 reduces, and of the weights it gathers, at once.
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
