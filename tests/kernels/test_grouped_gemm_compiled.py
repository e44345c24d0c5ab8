"""Triton's grouped products compiled for sm_90: what must be in there, and what must not."""

import re
from functools import partial

import pytest
import torch

from kernels.quantize.layout import Quantized, QuantizedBlocks, QuantizedColumns, padded_rows
from tests.kernels.aot import Compiled, compile_launch

pytestmark = pytest.mark.slow

LARGE_COUNTS = (500, 0, 37, 640)
LARGEST_SHARED_BYTES = 227 * 1024


def compiled_rows_fp8(num_outputs: int, depth: int, dtype: torch.dtype, candidate: int | None) -> Compiled:
    import kernels.grouped_gemm.triton_fp8 as module
    from kernels.grouped_gemm.tuned import CANDIDATES

    num_rows, num_groups, tiles = sum(LARGE_COUNTS), len(LARGE_COUNTS), -(-depth // 128)
    rows = Quantized(torch.empty(num_rows, depth, dtype=torch.float8_e4m3fn), torch.empty(num_rows, tiles))
    codes = torch.empty(num_groups, num_outputs, depth, dtype=torch.float8_e4m3fn)
    weights = QuantizedBlocks(codes, torch.empty(num_groups, -(-num_outputs // 128), tiles))
    tiling = None if candidate is None else CANDIDATES[candidate]
    launch = partial(module.grouped_rows_fp8, rows, weights, LARGE_COUNTS, dtype, tiling=tiling)
    return compile_launch(module, "grouped_rows_fp8_kernel", launch)


def compiled_weight_fp8(num_outputs: int, num_inputs: int, candidate: int | None) -> Compiled:
    import kernels.grouped_gemm.triton_fp8 as module
    from kernels.grouped_gemm.tuned import WEIGHT_CANDIDATES

    num_padded = padded_rows(LARGE_COUNTS)
    grad, rows = (
        QuantizedColumns(
            torch.empty(width, num_padded, dtype=torch.float8_e4m3fn), torch.empty(width, num_padded // 128)
        )
        for width in (num_outputs, num_inputs)
    )
    tiling = module.WEIGHT_TILING if candidate is None else WEIGHT_CANDIDATES[candidate]
    launch = partial(module.grouped_weight_fp8, grad, rows, LARGE_COUNTS, tiling=tiling)
    return compile_launch(module, "grouped_weight_fp8_kernel", launch)


def assert_pipelined(compiled: Compiled, operand: str, depth: int) -> None:
    """Asserts tensor cores, in-place sums, operands loaded ahead by descriptor, and results stored under masks."""
    assert len(compiled.cubin) > 1000
    assert compiled.spill_bytes == 0
    assert compiled.shared_bytes <= LARGEST_SHARED_BYTES
    # Addresses in 32 bits are those of shared memory, a row's length being known.
    assert re.findall(r"(?:mul|mad)\.lo\.[su]32\s+%r\d+, %r\d+, %", compiled.ptx) == []
    products = compiled.instructions(r"wgmma\.mma_async")
    assert products
    name = rf"wgmma\.mma_async\.sync\.aligned\.m64n\d+k{depth}\.f32\.{operand}\.{operand}"
    assert all(re.fullmatch(name, each) for each in products)
    assert compiled.instructions(r"mma\.sync") == []
    assert len(compiled.instructions(r"cp\.async\.bulk\.tensor\.[23]d\.shared")) >= 2
    assert compiled.instructions(r"cp\.async\.bulk\.tensor.*\.global\.shared") == []
    assert compiled.instructions(r"mbarrier\.try_wait")
    assert compiled.instructions(r".*\.ftz") == []


@pytest.mark.parametrize("candidate", range(4))
def test_compiled_product_of_groups_is_pipelined_with_any_tiling(candidate: int) -> None:
    from kernels.grouped_gemm.tuned import CANDIDATES

    compiled = compiled_rows_fp8(4096, 7168, torch.bfloat16, candidate)
    assert_pipelined(compiled, "e4m3", 32)
    tiling = CANDIDATES[candidate]
    multiplying = 2 if tiling.specialize else 1
    assert len(compiled.instructions(r"wgmma\.mma_async")) == 4 * multiplying
    # One fused operation adds a number to the sum in float32: both scales were multiplied before.
    numbers = tiling.rows * tiling.outputs // (32 * tiling.warps * multiplying)
    assert len(compiled.instructions(r"fma\.rn\.f32")) == numbers * multiplying
    assert len(compiled.instructions(r"mul\.(rn\.)?f32")) <= 8
    assert bool(compiled.instructions(r"setmaxnreg")) == tiling.specialize
    stores = re.findall(r"st\.global\S*\.v4\S*", compiled.ptx)
    assert len(stores) == numbers * multiplying // 8  # 16 bytes at a time
    # So many programs have room on a multiprocessor at once.
    assert tiling.programs_per_sm * compiled.registers * 32 * compiled.num_warps <= 2**16


@pytest.mark.parametrize("candidate", range(4))
def test_compiled_gradient_of_groups_is_pipelined_with_any_tiling(candidate: int) -> None:
    from kernels.grouped_gemm.tuned import WEIGHT_CANDIDATES

    compiled = compiled_weight_fp8(4096, 7168, candidate)
    assert_pipelined(compiled, "e4m3", 32)
    tiling = WEIGHT_CANDIDATES[candidate]
    assert tiling.programs_per_sm * compiled.registers * 32 * compiled.num_warps <= 2**16
    assert tiling.programs_per_sm * (compiled.shared_bytes + 1024) <= LARGEST_SHARED_BYTES + 1024


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compiled_products_of_groups_of_odd_width_are_sound(dtype: torch.dtype) -> None:
    for num_outputs, depth in ((131, 200), (131, 128), (2056, 128)):
        assert_pipelined(compiled_rows_fp8(num_outputs, depth, dtype, None), "e4m3", 32)
    if dtype == torch.float32:
        assert_pipelined(compiled_weight_fp8(131, 201, None), "e4m3", 32)


def compiled_16_bits(dtype: torch.dtype, num_outputs: int, across: bool) -> Compiled:
    import kernels.grouped_gemm.triton as module

    rows = torch.empty(sum(LARGE_COUNTS), 7168, dtype=dtype)
    weight = torch.empty(len(LARGE_COUNTS), num_outputs, 7168, dtype=dtype)
    if across:
        weight = torch.empty(len(LARGE_COUNTS), 7168, num_outputs, dtype=dtype).transpose(1, 2)
    return compile_launch(module, "grouped_rows_kernel", partial(module.grouped_rows, rows, weight, LARGE_COUNTS))


def compiled_weight_16_bits(dtype: torch.dtype, num_inputs: int) -> Compiled:
    import kernels.grouped_gemm.triton as module

    grad = torch.empty(sum(LARGE_COUNTS), 4096, dtype=dtype)
    rows = torch.empty(sum(LARGE_COUNTS), num_inputs, dtype=dtype)
    return compile_launch(module, "grouped_weight_kernel", partial(module.grouped_weight, grad, rows, LARGE_COUNTS))


@pytest.mark.parametrize(
    ("num_outputs", "across"), [(4096, False), (4096, True), (4097, False), (4097, True), (2056, False), (2056, True)]
)
def test_compiled_product_of_groups_in_bfloat16_is_pipelined(num_outputs: int, across: bool) -> None:
    compiled = compiled_16_bits(torch.bfloat16, num_outputs, across)
    assert_pipelined(compiled, "bf16", 16)
    assert len(compiled.instructions(r"wgmma\.mma_async")) == 4


@pytest.mark.parametrize("num_inputs", [7168, 7161])
def test_compiled_gradient_of_groups_in_bfloat16_is_pipelined(num_inputs: int) -> None:
    assert_pipelined(compiled_weight_16_bits(torch.bfloat16, num_inputs), "bf16", 16)


def test_compiled_products_of_groups_in_other_types_are_sound() -> None:
    assert_pipelined(compiled_16_bits(torch.float16, 4096, False), "f16", 16)
    for compiled in (compiled_16_bits(torch.float32, 4096, False), compiled_weight_16_bits(torch.float32, 7168)):
        compiled.assert_sound()
        assert compiled.instructions(r"(wgmma|mma)\.") == []  # neither has all bits of float32
        assert compiled.instructions(r"fma\.rn\.f32")
