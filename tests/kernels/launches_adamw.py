"""The launch of the optimizer's step, on about as many weights as a layer's share of ZeRO-1 has."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from kernels.adamw import compute_coefficients
from tests.kernels.launches import Launch

NUM_WEIGHTS = 2**26


def step(function: Callable[..., None], *tensors: Tensor) -> tuple[Tensor, ...]:
    """Weights, gradients and moments after a step, in place."""
    by = compute_coefficients(10, learning_rate=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    weights, gradients, means, squares = tensors
    function(weights, gradients, means, squares, by)
    return tensors


ADAMW = [
    Launch(
        module="kernels.adamw.triton",
        kernel="adamw_kernel",
        shape=f"{NUM_WEIGHTS}",
        bytes_moved=20 * NUM_WEIGHTS,
        prepare=lambda functions, tensors: partial(
            step,
            functions.adamw_bf16_moments,
            tensors.normal(NUM_WEIGHTS, dtype=torch.float32),
            tensors.normal(NUM_WEIGHTS, dtype=torch.float32),
            tensors.normal(NUM_WEIGHTS),
            tensors.scales(NUM_WEIGHTS, dtype=torch.bfloat16),
        ),
        reference="kernels.adamw.reference",
    )
]
