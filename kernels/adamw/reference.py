"""AdamW over float32 weights with two moments that are stored in bf16, in plain PyTorch.

Every operation rounds once to float32, so the result depends on no device, address or shard. Divisions by a common
number are multiplications by its inverse, as in torch on CUDA.
"""

# Shape legend: N numbers, in any shape.

import math
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**16
"""Numbers processed in float32 at a time: few enough for a core's cache, enough to hide the cost of calls."""


class Coefficients(NamedTuple):
    """Coefficients of the update, computed in float64 and rounded once to float32 where they are used."""

    keep_weight: float  # 1 - learning rate x weight decay
    keep_mean: float  # beta1
    add_gradient: float  # 1 - beta1
    keep_square: float  # beta2
    add_square: float  # 1 - beta2
    correct_root: float  # 1 / sqrt(1 - beta2^step)
    eps: float  # term added to the corrected root
    move: float  # -learning rate / (1 - beta1^step)


def compute_coefficients(
    step: int, *, learning_rate: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> Coefficients:
    """Computes the coefficients of update `step`, from 1, as torch does (arXiv:1711.05101)."""
    beta1, beta2 = betas
    return Coefficients(
        keep_weight=1 - learning_rate * weight_decay,
        keep_mean=beta1,
        add_gradient=1 - beta1,
        keep_square=beta2,
        add_square=1 - beta2,
        correct_root=1 / math.sqrt(1 - beta2**step),
        eps=eps,
        move=-learning_rate / (1 - beta1**step),
    )


@torch.no_grad()
def adamw_bf16_moments(
    weights: Tensor, gradients: Tensor, means: Tensor, squares: Tensor, coefficients: Coefficients
) -> None:
    """Takes one step in place: both moments in float32, then the weights, then rounds the moments to bf16.

        mean = beta1 mean + (1 - beta1) gradient; square = beta2 square + (1 - beta2) gradient^2
        weight = weight (1 - rate decay) - rate / (1 - beta1^t) mean / (sqrt(square) / sqrt(1 - beta2^t) + eps)

    Weights and gradients are float32, moments bf16 (arXiv:2412.19437, section 3.3.3), all contiguous. A NaN in the
    gradient makes both moments and the weight NaN.
    """
    check_step(weights, gradients, means, squares)
    size = min(CHUNK_ELEMENTS, weights.numel())
    scratch = weights.new_empty(3, size)
    roots_N = weights.new_empty(size, dtype=torch.float64)
    parts = (tensor.view(-1).split(CHUNK_ELEMENTS) for tensor in (weights, gradients, means, squares))
    for weight_N, gradient_N, mean_N, square_N in zip(*parts, strict=True):
        part = slice(len(weight_N))
        _step(weight_N, gradient_N, mean_N, square_N, scratch[:, part], roots_N[part], coefficients)


def _step(
    weight_N: Tensor,
    gradient_N: Tensor,
    mean_N: Tensor,
    square_N: Tensor,
    scratch: Tensor,
    root_N: Tensor,
    by: Coefficients,
) -> None:
    """Applies the rule to one chunk; `scratch` holds three buffers of its size, `root_N` one in float64."""
    new_mean_N, new_square_N, part_N = scratch
    # Both moments in float32, one rounding for each operation.
    torch.mul(gradient_N, by.add_gradient, out=part_N)
    new_mean_N.copy_(mean_N).mul_(by.keep_mean).add_(part_N)
    torch.mul(gradient_N, gradient_N, out=part_N).mul_(by.add_square)
    new_square_N.copy_(square_N).mul_(by.keep_square).add_(part_N)
    # The moments are stored in bf16, but the weights use their float32 values.
    mean_N.copy_(new_mean_N)
    square_N.copy_(new_square_N)
    # torch's square root in float32 (MKL) is not the nearest number in about 1 % of cases.
    new_square_N.copy_(root_N.copy_(new_square_N).sqrt_()).mul_(by.correct_root).add_(by.eps)
    weight_N.mul_(by.keep_weight).add_(new_mean_N.div_(new_square_N).mul_(by.move))


def check_step(weights: Tensor, gradients: Tensor, means: Tensor, squares: Tensor) -> None:
    """Raises ValueError, which names the first tensor of another type or shape, or not contiguous."""
    wanted = {"weights": torch.float32, "gradients": torch.float32, "means": torch.bfloat16, "squares": torch.bfloat16}
    for (name, dtype), tensor in zip(wanted.items(), (weights, gradients, means, squares), strict=True):
        if (tensor.dtype, tensor.shape) != (dtype, weights.shape):
            raise ValueError(
                f"adamw_bf16_moments: {name} must be {dtype} {tuple(weights.shape)}, "
                f"is {tensor.dtype} {tuple(tensor.shape)}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"adamw_bf16_moments: {name} must be contiguous, has strides {tensor.stride()}")
