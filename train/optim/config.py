"""Defines the configuration of the optimizer. No torch here."""

from dataclasses import dataclass
from typing import Annotated, Literal

from kernels.ranges import NonNegativeFloat, PositiveFloat, PositiveInt, ShareBelowOne
from train.optim.learning_rate import LR_SCHEDULES, RateSchedule


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """The configuration of AdamW.

    `sharding`: `zero1` shards the state over ranks with the same parameters (DeepSpeed); `replicated` does not (torch).
    `moments`: `float32` means float64 for float64 weights, which require `replicated`. Norms have no weight decay.
    A run may resume with another type of moments: bf16 rounds float32 moments, and float32 keeps bf16 ones.
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
