"""Counts of a model before it is built: its weights, and the bytes that a micro-batch keeps. No torch here."""

from model.account.activations import (
    ActivationAccount,
    MicroBatchShape,
    count_fp8_activations,
    count_plain_activations,
)
from model.account.parameters import ParameterAccount, count_parameters, training_flops_per_token
from model.config import ModelConfig, Products, Recomputed

__all__ = [
    "ActivationAccount",
    "MicroBatchShape",
    "ParameterAccount",
    "count_activations",
    "count_parameters",
    "training_flops_per_token",
]


def count_activations(
    config: ModelConfig, shape: MicroBatchShape, recomputed: frozenset[Recomputed], products: Products = "own"
) -> ActivationAccount:
    """Bytes kept for the backward of a micro-batch, by part of the model.

    Args:
        config: the architecture.
        shape: of a micro-batch.
        recomputed: what the backward computes anew; with products in FP8 it is all that can be, whatever is said here.
        products: in what those of linear maps are computed. Scales take the same room whatever their values.
    """
    if products == "own":
        return count_plain_activations(config, shape, recomputed)
    return count_fp8_activations(config, shape)
