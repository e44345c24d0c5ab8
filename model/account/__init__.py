"""Counts a model's weights, and the bytes that a micro-batch keeps, before the model is built.

Imports no torch.
"""

from model.account.activations import (
    ActivationAccount,
    MicroBatchShape,
    count_fp8_activations,
    count_plain_activations,
)
from model.account.parameters import ParameterAccount, count_parameters, training_flops_per_token
from model.config import ModelConfig, Products, Recomputed, all_recomputed

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
    """Counts the bytes that a micro-batch keeps for its backward, by part of the model.

    Args:
        recomputed: what the backward computes again; if products are in FP8, only `layer` makes a difference.
        products: type in which linear maps are computed. The size of scales does not depend on their values.
    """
    recomputed = all_recomputed(recomputed)
    if products == "own":
        return count_plain_activations(config, shape, recomputed)
    return count_fp8_activations(config, shape, recomputed)
