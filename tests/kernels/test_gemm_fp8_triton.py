"""Triton's products in FP8: interpreted, near exact ones as float32 allows; compiled for sm_90, what must be in there.

Shape legend: M rows of the left operand, N rows of the right one, K numbers in a row of both.
"""

import re
from functools import partial

import pytest
import torch

import kernels.gemm_fp8.triton as module
from kernels.gemm_fp8 import tuned
from kernels.gemm_fp8.tiling import Tiling
from kernels.gemm_fp8.triton import gemm_fp8, gemm_fp8_columns
from kernels.gemm_fp8.tuned import CANDIDATES, COLUMN_CANDIDATES, TunedProduct
from kernels.quantize.layout import Quantized, QuantizedBlocks, QuantizedColumns
from tests.kernels.agreement_gemm import check_columns, check_empty, check_gemm, check_nan, column_operands, operands
from tests.kernels.aot import Compiled, compile_launch
from tests.kernels.interpreter_casts import interpreted

pytestmark = pytest.mark.slow

LARGEST_SHARED_BYTES = 227 * 1024


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@interpreted
def test_interpreted_product_is_near_the_exact_one(dtype: torch.dtype) -> None:
    for shape in ((1, 1, 1), (5, 8, 33), (130, 131, 200), (129, 256, 256), (300, 48, 129)):
        check_gemm(gemm_fp8, "cpu", shape, dtype)


@interpreted
def test_interpreted_product_over_rows_is_near_the_exact_one() -> None:
    for shape in ((1, 1, 128), (130, 131, 256), (200, 144, 384)):
        check_columns(gemm_fp8_columns, "cpu", shape)


@interpreted
def test_interpreted_product_carries_nan_and_takes_nothing() -> None:
    check_nan(gemm_fp8, gemm_fp8_columns, "cpu")
    check_empty(gemm_fp8, gemm_fp8_columns, "cpu")


@interpreted
def test_interpreted_product_is_near_the_exact_one_with_any_tiling() -> None:
    """Groups of tiles do not divide the result evenly, and programs process several tiles."""
    for tiling in (Tiling(rows=16, outputs=16, group=3), Tiling(rows=32, outputs=64, specialize=True, group=1)):
        check_gemm(partial(gemm_fp8, tiling=tiling), "cpu", (70, 130, 130), torch.float32)
        check_columns(partial(gemm_fp8_columns, tiling=tiling), "cpu", (70, 48, 128))


@interpreted
def test_interpreted_product_reads_any_layout() -> None:
    """Strided, transposed and unaligned operands, surrounded by NaN, are read correctly."""
    left, right = operands((20, 130, 200))
    expected = gemm_fp8(left, right, torch.float32)
    for columns in (slice(16, 216), slice(3, 203)):
        wide = torch.full((22, 240), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
        wide[1:21, columns] = left.codes
        scales = torch.cat([left.scales, left.scales], dim=1)[:, 1:3].flip(1)
        apart = Quantized(wide[1:21, columns], scales)
        assert torch.equal(gemm_fp8(apart, right, torch.float32), expected)
    across = Quantized(left.codes.t().contiguous().t(), left.scales.t().contiguous().t())
    right_across = QuantizedBlocks(right.codes.t().contiguous().t(), right.scales.t().contiguous().t())
    assert torch.equal(gemm_fp8(across, right_across, torch.float32), expected)
    first, second = column_operands((20, 40, 384))
    part = (
        QuantizedColumns(first.codes[:, 128:], first.scales[:, 1:]),
        QuantizedColumns(second.codes[:, 128:], second.scales[:, 1:]),
    )
    whole = (QuantizedColumns(*(each.contiguous() for each in operand)) for operand in part)
    assert torch.equal(gemm_fp8_columns(*part), gemm_fp8_columns(*whole))


@interpreted
def test_interpreted_tuner_measures_all_candidates_once_for_a_shape() -> None:
    """Nothing is measured without elements, at odd widths, or for float64, which is stored by mask."""
    measured: list[float] = []

    def milliseconds(call: object) -> float:
        measured.append(float(len(measured) + 1))
        return 10 - measured[-1]

    candidates = (Tiling(rows=16, outputs=16), Tiling(rows=32, outputs=32))
    product = TunedProduct(gemm_fp8, tuned.gemm_key, candidates, milliseconds)
    lengths = []
    for shape in ((5, 24, 128), (8, 24, 128), (9, 24, 128), (0, 24, 128), (5, 20, 128)):
        check_gemm(product, "cpu", shape, torch.bfloat16)
        lengths.append(len(measured))
    product(*operands((7, 24, 128)), torch.float64)
    assert [*lengths, len(measured)] == [2, 2, 4, 4, 4, 4]
    columns = TunedProduct(gemm_fp8_columns, tuned.gemm_key, candidates, milliseconds)
    check_columns(columns, "cpu", (5, 24, 128))
    assert len(measured) == 6
    assert {*product._chosen.values(), *columns._chosen.values()} == {Tiling(rows=32, outputs=32)}
    check_gemm(tuned.gemm_fp8, "cpu", (5, 24, 128), torch.bfloat16)
    assert not tuned.gemm_fp8._chosen


def compiled_blocks(shape: tuple[int, int, int], dtype: torch.dtype, candidate: int | None) -> Compiled:
    num_rows, num_outputs, depth = shape
    left = Quantized(torch.empty(num_rows, depth, dtype=torch.float8_e4m3fn), torch.empty(num_rows, -(-depth // 128)))
    scales = torch.empty(-(-num_outputs // 128), -(-depth // 128))
    right = QuantizedBlocks(torch.empty(num_outputs, depth, dtype=torch.float8_e4m3fn), scales)
    tiling = None if candidate is None else CANDIDATES[candidate]
    return compile_launch(module, "gemm_kernel", lambda: module.gemm_fp8(left, right, dtype, tiling=tiling))


def compiled_columns(candidate: int | None) -> Compiled:
    left, right = (
        QuantizedColumns(torch.empty(rows, 4096, dtype=torch.float8_e4m3fn), torch.empty(rows, 32))
        for rows in (2048, 7168)
    )
    tiling = None if candidate is None else COLUMN_CANDIDATES[candidate]
    return compile_launch(module, "gemm_kernel", lambda: module.gemm_fp8_columns(left, right, tiling=tiling))


def assert_pipelined(compiled: Compiled) -> None:
    """Asserts FP8 on tensor cores, operands loaded ahead by descriptor, and few instructions for promotion.

    Four instructions move a sum to the float32 sum.
    """
    compiled.assert_sound()
    assert compiled.shared_bytes <= LARGEST_SHARED_BYTES
    products = compiled.instructions(r"wgmma\.mma_async")
    assert products
    assert all(re.fullmatch(r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.f32\.e4m3\.e4m3", name) for name in products)
    assert compiled.instructions(r"mma\.sync") == []
    assert len(compiled.instructions(r"cp\.async\.bulk\.tensor\.2d\.shared")) >= 2
    assert compiled.instructions(r"mbarrier\.try_wait")
    assert compiled.instructions(r".*\.ftz") == []


@pytest.mark.parametrize("candidate", range(5))
def test_compiled_product_is_pipelined_with_any_tiling(candidate: int) -> None:
    compiled = compiled_blocks((4096, 2048, 7168), torch.bfloat16, candidate)
    assert_pipelined(compiled)
    tiling = CANDIDATES[candidate]
    multiplying = 2 if tiling.specialize else 1
    assert len(compiled.instructions(r"wgmma\.mma_async")) == 4 * multiplying
    # One fused operation adds a number to the sum in float32: both scales were multiplied before.
    warps = tiling.warps * multiplying
    numbers = tiling.rows * tiling.outputs // (32 * warps)
    assert len(compiled.instructions(r"fma\.rn\.f32")) == numbers * multiplying
    assert len(compiled.instructions(r"mul\.(rn\.)?f32")) <= 8
    assert bool(compiled.instructions(r"setmaxnreg")) == tiling.specialize
    assert compiled.instructions(r"cp\.async\.bulk\.tensor\.2d\.global")


@pytest.mark.parametrize("candidate", [None, 1, 2])
def test_compiled_product_over_rows_is_pipelined(candidate: int | None) -> None:
    compiled = compiled_columns(candidate)
    assert_pipelined(compiled)
    assert compiled.instructions(r"cp\.async\.bulk\.tensor\.2d\.global")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compiled_product_of_odd_width_is_stored_under_a_mask(dtype: torch.dtype) -> None:
    compiled = compiled_blocks((33, 131, 200), dtype, None)
    assert_pipelined(compiled)
    assert compiled.instructions(r"cp\.async\.bulk\.tensor\.2d\.global") == []
    assert compiled.instructions(r"st\.global")


def test_compiled_product_in_float32_is_sound() -> None:
    assert_pipelined(compiled_blocks((4096, 2048, 7168), torch.float32, None))
