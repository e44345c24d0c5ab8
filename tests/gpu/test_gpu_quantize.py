"""Triton's 1x128 quantisation on a CUDA device, bit-equal to the reference on the CPU."""

import pytest
import torch

from kernels.select import implementation_for, quantize_kernels
from tests.kernels.agreement import check_dequantize, check_quantize

SHAPES = [(32, 1), (33, 127), (16, 128), (70, 129), (4096, 7168), (1000, 7264)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_quantize_on_the_gpu_equals_the_reference(dtype: torch.dtype) -> None:
    kernels = quantize_kernels(implementation_for(torch.device("cuda")))
    for num_rows, num_columns in SHAPES:
        quantized = check_quantize(kernels, "cuda", num_rows, num_columns, dtype)
        check_dequantize(kernels, "cuda", quantized, dtype)


@pytest.mark.parametrize(("num_rows", "num_columns"), [(0, 128), (3, 0)])
def test_quantize_on_the_gpu_of_nothing_has_its_shapes(num_rows: int, num_columns: int) -> None:
    kernels = quantize_kernels("triton")
    quantized = kernels.quantize_1x128(torch.ones(num_rows, num_columns, device="cuda"), True)
    assert quantized.codes.shape == (num_rows, num_columns)
    assert quantized.scales.shape == (num_rows, num_columns // 128)
    assert kernels.dequantize_1x128(quantized, torch.bfloat16).shape == (num_rows, num_columns)
