"""Counts a model's weights, and the bytes that a micro-batch keeps, before the model is built.

Imports no torch.
"""

from model.size.micro_batch import Sizes
from model.size.phases import PhaseBytes, sliced_phases, stage_phases
from model.size.weights import (
    HeldParameters,
    ParameterAccount,
    StageShape,
    attention_parameters,
    count_parameters,
    count_work,
    held_parameters,
    slice_lengths,
    slice_starts,
    stage_shapes,
    training_flops_per_token,
)

__all__ = [
    "HeldParameters",
    "ParameterAccount",
    "PhaseBytes",
    "Sizes",
    "StageShape",
    "attention_parameters",
    "count_parameters",
    "count_work",
    "held_parameters",
    "slice_lengths",
    "slice_starts",
    "sliced_phases",
    "stage_phases",
    "stage_shapes",
    "training_flops_per_token",
]
