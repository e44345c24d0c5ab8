"""Triton's AdamW with bf16 moments on a CUDA device, bit-equal to the reference on the CPU."""

import pytest
from torch import Tensor

import kernels.adamw.reference as reference
from kernels.adamw.reference import Coefficients
from kernels.adamw.triton import adamw_bf16_moments
from tests.kernels.agreement import assert_same_bits
from tests.kernels.test_adamw import STEPS, every, tensors


@pytest.mark.parametrize("by", STEPS)
@pytest.mark.parametrize("num_weights", [1, 1023, 4096, 1_000_003])
def test_adamw_on_the_gpu_equals_the_reference(num_weights: int, by: Coefficients) -> None:
    ours, theirs = every(Tensor.cuda, tensors(num_weights)), tensors(num_weights)
    adamw_bf16_moments(*ours, by)
    reference.adamw_bf16_moments(*theirs, by)
    for actual, expected in zip(ours, theirs, strict=True):
        assert_same_bits(actual, expected)
