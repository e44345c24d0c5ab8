"""What the implementations of a step demand of their tensors."""

import torch
from torch import Tensor


def check_step(weights: Tensor, gradients: Tensor, means: Tensor, squares: Tensor) -> None:
    """Refuses tensors that `adamw_bf16_moments` cannot take.

    Raises:
        ValueError: names the first tensor of another type or shape than it must have, or that is not contiguous.
    """
    wanted = {"weights": torch.float32, "gradients": torch.float32, "means": torch.bfloat16, "squares": torch.bfloat16}
    for (name, dtype), tensor in zip(wanted.items(), (weights, gradients, means, squares), strict=True):
        if (tensor.dtype, tensor.shape) != (dtype, weights.shape):
            raise ValueError(
                f"adamw_bf16_moments: {name} must be {dtype} {tuple(weights.shape)}, "
                f"is {tensor.dtype} {tuple(tensor.shape)}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"adamw_bf16_moments: {name} must be contiguous, has strides {tensor.stride()}")
