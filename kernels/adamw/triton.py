"""AdamW over float32 weights with bf16 moments, in Triton: bit-equal to kernels/adamw/reference.py.

Memory-bound: each weight reads 12 bytes and writes 8; nothing else is stored.

    kernel         grid       tile           accumulator  rounding
    adamw_kernel   N / block  block numbers  none         every operation once to float32, none fused;
                                                          moments to nearest even into bf16
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.adamw.reference import Coefficients, check_step
from kernels.launch import launch_kernel

# These arguments change with every step or tensor: a kernel specialized for one value would run only once.
_CHANGING = ["num_weights", "keep_weight", "correct_root", "move"]


@triton.jit  # type: ignore[untyped-decorator]
def adamw_tile(
    weights: tl.tensor,
    gradients: tl.tensor,
    means: tl.tensor,
    squares: tl.tensor,
    keep_weight: tl.tensor,
    keep_mean: tl.tensor,
    add_gradient: tl.tensor,
    keep_square: tl.tensor,
    add_square: tl.tensor,
    correct_root: tl.tensor,
    eps: tl.tensor,
    move: tl.tensor,
    inside: tl.tensor,
) -> None:
    """Applies the rule at four tiles of pointers, to the numbers that `inside` selects, None for all."""
    gradient = tl.load(gradients, mask=inside)
    mean = tl.load(means, mask=inside).to(tl.float32)
    square = tl.load(squares, mask=inside).to(tl.float32)
    weight = tl.load(weights, mask=inside)
    # Both moments in float32; the weights use these, not what bf16 stores.
    mean = mean * keep_mean + gradient * add_gradient
    square = square * keep_square + gradient * gradient * add_square
    tl.store(means, mean.to(tl.bfloat16), mask=inside)
    tl.store(squares, square.to(tl.bfloat16), mask=inside)
    denominator = tl.sqrt_rn(square) * correct_root + eps
    tl.store(weights, weight * keep_weight + tl.div_rn(mean, denominator) * move, mask=inside)


@triton.jit(do_not_specialize=_CHANGING)  # type: ignore[untyped-decorator]
def adamw_kernel(
    weights: tl.tensor,
    gradients: tl.tensor,
    means: tl.tensor,
    squares: tl.tensor,
    num_weights: tl.tensor,
    keep_weight: tl.tensor,
    keep_mean: tl.tensor,
    add_gradient: tl.tensor,
    keep_square: tl.tensor,
    add_square: tl.tensor,
    correct_root: tl.tensor,
    eps: tl.tensor,
    move: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Updates one block of weights and its moments."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = start + tl.arange(0, BLOCK)
    by = (keep_weight, keep_mean, add_gradient, keep_square, add_square, correct_root, eps, move)
    # Without a mask, loads and stores move 16 bytes at a time for any number of weights.
    if start + BLOCK <= num_weights:
        adamw_tile(weights + offsets, gradients + offsets, means + offsets, squares + offsets, *by, None)
    else:
        inside = offsets < num_weights
        adamw_tile(weights + offsets, gradients + offsets, means + offsets, squares + offsets, *by, inside)


def adamw_bf16_moments(
    weights: Tensor,
    gradients: Tensor,
    means: Tensor,
    squares: Tensor,
    coefficients: Coefficients,
    *,
    block: int = 1024,
    num_warps: int = 4,
) -> None:
    """Implements `reference.adamw_bf16_moments`; a program updates `block` numbers, a power of two."""
    check_step(weights, gradients, means, squares)
    sizes = (weights.numel(),)
    tensors = (weights, gradients, means, squares)
    launch_kernel(adamw_kernel, tensors, sizes, (block,), **coefficients._asdict(), BLOCK=block, num_warps=num_warps)
