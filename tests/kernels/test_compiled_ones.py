"""Kernels compiled for sm_90 with sizes of 1, which a launch on a GPU specializes as Python integers.

Triton's interpreter does not specialize: every size is a tensor.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch

from kernels.gemm_fp8.tiling import Tiling
from kernels.quantize.layout import padded_rows
from tests.kernels.aot import compile_launch
from tests.kernels.launches import Tensors

pytestmark = pytest.mark.slow

MADE = Tensors(torch.device("cpu"))
COUNTS = (3,)


def call_of(module: Any, kernel: str, num_outputs: int, depth: int) -> Callable[[], Any]:
    """Returns a launch of the kernel with matrices of so many rows and columns."""
    num_rows, num_padded = sum(COUNTS), padded_rows(COUNTS)
    match kernel:
        case "quantize_blocks_kernel":
            return partial(module.quantize_128x128, MADE.normal(num_outputs, depth), power_of_two=False)
        case "dequantize_blocks_kernel":
            return partial(module.dequantize_128x128, MADE.blocks(num_outputs, depth), torch.bfloat16)
        case "transpose_blocks_kernel":
            return partial(module.transpose_blocks, MADE.blocks(num_outputs, depth))
        case "gemm_kernel":
            operands = MADE.rows(num_rows, depth), MADE.blocks(num_outputs, depth)
            return partial(module.gemm_fp8, *operands, torch.bfloat16)
        case "grouped_rows_fp8_kernel":
            operands = MADE.rows(num_rows, depth), MADE.blocks(1, num_outputs, depth)
            return partial(module.grouped_rows_fp8, *operands, COUNTS, torch.bfloat16)
        case "grouped_weight_fp8_kernel":
            columns = MADE.columns(num_outputs, num_padded), MADE.columns(depth, num_padded)
            return partial(module.grouped_weight_fp8, *columns, COUNTS)
        case "grouped_rows_kernel":
            return partial(
                module.grouped_rows, MADE.normal(num_rows, depth), MADE.normal(1, num_outputs, depth), COUNTS
            )
        case _:
            rows = MADE.normal(num_rows, num_outputs), MADE.normal(num_rows, depth)
            return partial(module.grouped_weight, *rows, COUNTS)


@pytest.mark.parametrize(
    ("name", "kernel"),
    [("gemm_fp8.triton", "gemm_kernel"), ("grouped_gemm.triton_fp8", "grouped_rows_fp8_kernel")],
)
def test_kernel_with_specialized_warps_compiles_if_the_depth_is_one(name: str, kernel: str) -> None:
    """The tuner tries that tiling, and the compiler's pass for it fails on a loop that is known to run once."""
    module = import_module(f"kernels.{name}")
    launch = partial(call_of(module, kernel, 256, 1), tiling=Tiling(specialize=True, warps=4))
    assert compile_launch(module, kernel, launch).spill_bytes == 0


@pytest.mark.parametrize(("num_outputs", "depth"), [(1, 130), (130, 1), (1, 1)])
@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("quantize.triton", "quantize_blocks_kernel"),
        ("quantize.triton", "dequantize_blocks_kernel"),
        ("quantize.triton", "transpose_blocks_kernel"),
        ("gemm_fp8.triton", "gemm_kernel"),
        ("grouped_gemm.triton_fp8", "grouped_rows_fp8_kernel"),
        ("grouped_gemm.triton_fp8", "grouped_weight_fp8_kernel"),
        ("grouped_gemm.triton", "grouped_rows_kernel"),
        ("grouped_gemm.triton", "grouped_weight_kernel"),
    ],
)
def test_kernel_compiles_if_a_size_is_one(name: str, kernel: str, num_outputs: int, depth: int) -> None:
    module = import_module(f"kernels.{name}")
    compiled = compile_launch(module, kernel, call_of(module, kernel, num_outputs, depth))
    assert len(compiled.cubin) > 1000
    assert compiled.spill_bytes == 0
