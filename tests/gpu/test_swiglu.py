"""Triton's SwiGLU on a CUDA device, near the reference on the CPU."""

import pytest
import torch

import kernels.swiglu.triton as plain
import kernels.swiglu.triton_fp8 as fp8
from tests.kernels.agreement import assert_same_bits
from tests.kernels.agreement_fused import check_swiglu, check_swiglu_fp8, hidden_and_grad

SHAPES = [(5, 1), (9, 100), (3, 600), (1000, 2048), (300, 1407)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu_on_the_gpu_is_near_the_reference(shape: tuple[int, int], dtype: torch.dtype) -> None:
    check_swiglu(plain, "cuda", shape, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("weights_dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu_in_fp8_on_the_gpu_is_near_the_reference(
    shape: tuple[int, int], dtype: torch.dtype, weights_dtype: torch.dtype | None
) -> None:
    check_swiglu_fp8(fp8, "cuda", shape, dtype, weights_dtype)


def test_swiglu_in_fp8_on_the_gpu_repeats_itself_bit_by_bit() -> None:
    hidden_AH, grad_AM = (each.cuda() for each in hidden_and_grad((4096, 2048), torch.bfloat16))
    weights_A = torch.rand(4096, device="cuda")
    _, cached = fp8.swiglu_quantize(hidden_AH, weights_A, power_of_two=False)
    first = [each.cpu() for each in fp8.swiglu_backward_from_codes(grad_AM, cached, weights_A) if each is not None]
    for _ in range(5):
        again = [each for each in fp8.swiglu_backward_from_codes(grad_AM, cached, weights_A) if each is not None]
        for made, expected in zip(again, first, strict=True):
            assert_same_bits(made, expected)
