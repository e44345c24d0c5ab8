"""AdamW with moments in bf16: the reference against the rule itself, Triton's against the reference, bit by bit."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import kernels.adamw.reference as reference
import kernels.adamw.triton as module
from kernels.adamw.reference import Coefficients, compute_coefficients
from tests.kernels.agreement import assert_same_bits
from tests.kernels.aot import Compiled, compile_launch
from tests.kernels.interpreter_casts import interpreted

STEPS = [
    compute_coefficients(1, learning_rate=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1),
    compute_coefficients(7, learning_rate=2.2e-4, betas=(0.9, 0.95), eps=1e-20, weight_decay=0.0),
    compute_coefficients(100_000, learning_rate=7.3e-6, betas=(0.0, 0.98), eps=1e-8, weight_decay=0.1),
]


Four = tuple[Tensor, Tensor, Tensor, Tensor]


def tensors(num_weights: int) -> Four:
    """Weights, gradients and both moments of every magnitude; zeros, ties of the rounding and subnormal numbers too."""
    generator = torch.Generator().manual_seed(num_weights)
    exponents = torch.randint(-40, 12, (3, num_weights), generator=generator)
    numbers = torch.ldexp(torch.randn(3, num_weights, generator=generator), exponents)
    weights, gradients, means = (row.clone() for row in numbers)
    squares = means.square() * torch.rand(num_weights, generator=generator)
    means[::7], squares[::7], gradients[::11] = 0, 0, -0.0
    gradients[1::13] *= 1e-30
    # Without a mean before, beta1 = 0 rounds the gradient itself: half-way between two numbers of bf16.
    gradients[2::5] = 1 + (1 + 2 * torch.arange(len(gradients[2::5])) % 64) * 2.0**-8
    return weights, gradients, means.bfloat16(), squares.bfloat16()


def every(change: Callable[[Tensor], Tensor], four: Four) -> Four:
    weights, gradients, means, squares = four
    return change(weights), change(gradients), change(means), change(squares)


def plain(before: Four, by: Coefficients) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the rule in numpy's float32, one rounding per operation, with the last rounding of moments by bits."""
    weight, gradient, mean, square = (tensor.float().numpy() for tensor in before)
    keep_weight, keep_mean, add_gradient, keep_square, add_square, correct_root, eps, move = map(np.float32, by)
    mean = mean * keep_mean + gradient * add_gradient
    square = square * keep_square + gradient * gradient * add_square
    # In float64 a root of a float32 is exact enough to be rounded once.
    root = np.sqrt(square.astype(np.float64)).astype(np.float32)
    weight = weight * keep_weight + mean / (root * correct_root + eps) * move
    return torch.from_numpy(weight), nearest_even(mean), nearest_even(square)


def nearest_even(values: NDArray[Any]) -> Tensor:
    """Rounds finite float32 to bf16: adds half a step, minus one bit if the last kept bit is 0, and truncates."""
    bits = values.view(np.uint32).astype(np.uint64)
    kept = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return torch.from_numpy(kept.view(np.int16)).view(torch.bfloat16)


@pytest.mark.parametrize("by", STEPS)
@pytest.mark.parametrize("num_weights", [31, 2 * reference.CHUNK_ELEMENTS + 77])
def test_adamw_is_the_rule_rounded_once_an_operation(num_weights: int, by: Coefficients) -> None:
    weights, gradients, means, squares = before = tensors(num_weights)
    expected, kept = plain(before, by), gradients.clone()
    reference.adamw_bf16_moments(weights, gradients, means, squares, by)
    for actual, wanted in zip((weights, means, squares), expected, strict=True):
        assert_same_bits(actual, wanted)
    assert_same_bits(gradients, kept)


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0, 2)])
def test_adamw_of_nothing_is_nothing(shape: tuple[int, ...]) -> None:
    reference.adamw_bf16_moments(*every(lambda tensor: tensor.view(shape), tensors(0)), STEPS[0])


@pytest.mark.parametrize(
    ("place", "wrong", "message"),
    [
        (0, torch.zeros(4).double(), "weights must be torch.float32 (4,), is torch.float64 (4,)"),
        (1, torch.zeros(4).bfloat16(), "gradients must be torch.float32 (4,), is torch.bfloat16 (4,)"),
        (2, torch.zeros(4), "means must be torch.bfloat16 (4,), is torch.float32 (4,)"),
        (3, torch.zeros(5).bfloat16(), "squares must be torch.bfloat16 (4,), is torch.bfloat16 (5,)"),
        (1, torch.zeros(8)[::2], "gradients must be contiguous, has strides (2,)"),
    ],
)
def test_adamw_names_a_tensor_that_it_cannot_take(place: int, wrong: Tensor, message: str) -> None:
    given = [torch.zeros(4), torch.zeros(4), torch.zeros(4).bfloat16(), torch.zeros(4).bfloat16()]
    given[place] = wrong
    with pytest.raises(ValueError, match=re.escape(f"adamw_bf16_moments: {message}")):
        reference.adamw_bf16_moments(given[0], given[1], given[2], given[3], STEPS[0])


@pytest.mark.slow
@interpreted
def test_interpreted_adamw_equals_the_reference() -> None:
    # Whole blocks, a block begun, less than a block; and other blocks.
    for num_weights, block in ((1025, 512), (5, 1024), (64, 32)):
        for by in STEPS:
            ours, theirs = tensors(num_weights), tensors(num_weights)
            for gradients in (ours[1], theirs[1]):
                gradients[-2:] = torch.tensor([torch.nan, torch.inf])
            module.adamw_bf16_moments(*ours, by, block=block)
            reference.adamw_bf16_moments(*theirs, by)
            for actual, expected in zip(ours, theirs, strict=True):
                assert_same_bits(actual, expected, any_nan=True)
    module.adamw_bf16_moments(*tensors(0), STEPS[0])
    matrix = every(lambda tensor: tensor.view(6, 5), tensors(30))
    module.adamw_bf16_moments(*matrix, STEPS[0])
    assert_same_bits(matrix[0].view(30), plain(tensors(30), STEPS[0])[0])


@pytest.mark.slow
def test_compiled_adamw_moves_16_bytes_at_a_time_and_fuses_nothing() -> None:
    launch = partial(module.adamw_bf16_moments, *tensors(4097), STEPS[0])
    compiled: Compiled = compile_launch(module, "adamw_kernel", launch)
    compiled.assert_sound()
    assert compiled.registers <= 64
    # 8 numbers a thread: two loads each of weights and gradients, one of each moment; gradients are not stored.
    assert len(compiled.instructions(r"ld\.global.*v4\.b32")) == 6
    assert len(compiled.instructions(r"st\.global.*v4\.b32")) == 4
    assert compiled.instructions(r"fma") == []
    assert compiled.instructions(r".*\.ftz") == []
    assert compiled.instructions(r"(sqrt|div)\.(approx|full)") == []
