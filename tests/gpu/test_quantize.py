"""Triton's quantization on a CUDA device, bit-equal to the reference on the CPU."""

import pytest
import torch

import kernels.quantize.triton as rows
from tests.kernels.agreement import check_dequantize, check_quantize
from tests.kernels.agreement_formats import check_blocks, check_columns, check_e5m6

SHAPES = [(32, 1), (33, 127), (16, 128), (70, 129), (4096, 7168), (1000, 7264)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_quantize_on_the_gpu_equals_the_reference(dtype: torch.dtype) -> None:
    for num_rows, num_columns in SHAPES:
        quantized = check_quantize(rows, "cuda", num_rows, num_columns, dtype)
        check_dequantize(rows, "cuda", quantized, dtype)


@pytest.mark.parametrize(("num_rows", "num_columns"), [(0, 128), (3, 0)])
def test_quantize_on_the_gpu_of_nothing_has_its_shapes(num_rows: int, num_columns: int) -> None:
    quantized = rows.quantize_1x128(torch.ones(num_rows, num_columns, device="cuda"), power_of_two=True)
    assert quantized.codes.shape == (num_rows, num_columns)
    assert quantized.scales.shape == (num_rows, num_columns // 128)
    assert rows.dequantize_1x128(quantized, torch.bfloat16).shape == (num_rows, num_columns)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_columns_on_the_gpu_equal_the_reference(dtype: torch.dtype) -> None:
    import kernels.quantize.triton_columns as module

    for counts, num_columns in (([0, 130, 1, 0, 127, 128, 0], 136), ([5], 1), ([700, 0, 1348], 2048), ([1000], 1029)):
        check_columns(module, "cuda", counts, num_columns, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_on_the_gpu_equal_the_reference(dtype: torch.dtype) -> None:
    import kernels.quantize.triton as module

    for shape in ((1, 1), (2, 1, 130, 72), (4, 512, 1024), (576, 1031)):
        check_blocks(module, "cuda", shape, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_e5m6_on_the_gpu_equals_the_reference(dtype: torch.dtype) -> None:
    import kernels.quantize.triton_e5m6 as module

    for num_rows, num_columns in ((32, 1), (18, 271), (16, 130), (1000, 2048)):
        check_e5m6(module, "cuda", num_rows, num_columns, dtype)
