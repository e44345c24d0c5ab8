"""Triton's RMSNorm on a CUDA device, near the reference on the CPU."""

import pytest
import torch

import kernels.rms_norm.triton as plain
import kernels.rms_norm.triton_fp8 as fp8
from tests.kernels.agreement import assert_same_bits
from tests.kernels.agreement_fused import EPS, check_rms_norm, check_rms_norm_fp8, norm_inputs

SHAPES = [(5, 1), (9, 100), (40, 130), (70, 128), (3000, 512), (700, 1536), (1000, 7168), (20, 8192), (20, 5001)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_on_the_gpu_is_near_the_reference(shape: tuple[int, int], dtype: torch.dtype) -> None:
    check_rms_norm(plain, "cuda", shape, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_in_fp8_on_the_gpu_is_near_the_reference(shape: tuple[int, int], dtype: torch.dtype) -> None:
    check_rms_norm_fp8(fp8, "cuda", shape, dtype)


def test_gradients_of_rms_norm_on_the_gpu_repeat_themselves_bit_by_bit() -> None:
    x_AD, weight_D, grad_AD = (each.cuda() for each in norm_inputs((4096, 7168), torch.bfloat16))
    _, inverse_A1 = plain.rms_norm(x_AD, weight_D, EPS)
    normal, _ = fp8.rms_norm_quantize(x_AD, weight_D, EPS, power_of_two=False)

    def gradients() -> list[torch.Tensor]:
        return [
            *plain.normalize_backward(grad_AD, x_AD, inverse_A1, weight_D),
            *fp8.rms_norm_backward_from_codes(grad_AD, normal, inverse_A1, weight_D),
        ]

    first = [each.cpu() for each in gradients()]
    for _ in range(5):
        for made, expected in zip(gradients(), first, strict=True):
            assert_same_bits(made, expected)
