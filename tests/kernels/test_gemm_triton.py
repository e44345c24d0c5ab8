"""Triton's products: interpreted, near exact ones as float32 allows; compiled for sm_90, what must be in there.

Shape legend: M rows of the left operand, N rows of the right one, K numbers in a row of both.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch

import kernels.gemm.triton_fp8 as module
from kernels.gemm import tuned
from kernels.gemm import tuned as grouped_tuned
from kernels.gemm.triton_fp8 import gemm_fp8, gemm_fp8_columns, grouped_rows_fp8, grouped_weight_fp8
from kernels.gemm.tuned import CANDIDATES, COLUMN_CANDIDATES, TunedProduct
from kernels.launch import Tiling
from kernels.quantize.layout import Quantized, QuantizedBlocks, QuantizedColumns, padded_rows
from tests.covering import exhaustive
from tests.kernels.agreement_gemm import check_columns, check_empty, check_gemm, check_nan, column_operands, operands
from tests.kernels.agreement_grouped import (
    check_empty_fp8,
    check_nan_fp8,
    check_rows_fp8,
    check_weight_fp8,
)
from tests.kernels.agreement_grouped import column_operands as grouped_column_operands
from tests.kernels.agreement_grouped import operands as grouped_operands
from tests.kernels.aot import Compiled, compile_launch
from tests.kernels.interpreter_casts import interpreted

pytestmark = pytest.mark.slow
LARGEST_SHARED_BYTES = 227 * 1024


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@interpreted
def test_interpreted_product_is_near_the_exact_one(dtype: torch.dtype) -> None:
    for shape in ((1, 1, 1), (130, 131, 200), (129, 48, 256)):
        check_gemm(gemm_fp8, "cpu", shape, dtype)


@interpreted
def test_interpreted_product_over_rows_is_near_the_exact_one() -> None:
    for shape in ((1, 1, 128), (130, 131, 256)):
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
    """Asserts sound code with FP8 on tensor cores, and operands loaded ahead by descriptor."""
    compiled.assert_sound()
    assert_loaded_ahead(compiled, "e4m3", 32)


@pytest.mark.parametrize("candidate", [1, *exhaustive(0, 2, 3, 4)])
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


@pytest.mark.parametrize("candidate", [None, *exhaustive(1, 2)])
def test_compiled_product_over_rows_is_pipelined(candidate: int | None) -> None:
    compiled = compiled_columns(candidate)
    assert_pipelined(compiled)
    assert compiled.instructions(r"cp\.async\.bulk\.tensor\.2d\.global")


def test_compiled_product_of_odd_width_is_stored_under_a_mask() -> None:
    compiled = compiled_blocks((33, 131, 200), torch.float32, None)
    assert_pipelined(compiled)
    assert compiled.instructions(r"cp\.async\.bulk\.tensor\.2d\.global") == []
    assert compiled.instructions(r"st\.global")


COUNTS = (0, 130, 1, 0, 127)
ONE_GROUP = (0, 0, 131)


@contextmanager
def dots_of_bfloat16() -> Iterator[None]:
    """Patches dot products of bfloat16 to use numbers.

    Triton's interpreter multiplies their bits as integers.
    """
    import numpy as np
    import triton.language as tl
    import triton.runtime.interpreter as interpreter

    original = interpreter.InterpreterBuilder.create_dot

    def widened(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return interpreter.TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, left: Any, right: Any, *others: Any) -> Any:
        return original(self, widened(left), widened(right), *others)

    with patch.object(interpreter.InterpreterBuilder, "create_dot", create_dot):
        yield


@interpreted
def test_interpreted_products_of_groups_in_fp8_are_near_the_exact_ones() -> None:
    check_rows_fp8(grouped_rows_fp8, "cpu", COUNTS, (131, 200), torch.bfloat16)
    check_rows_fp8(grouped_rows_fp8, "cpu", ONE_GROUP, (48, 129), torch.float32)
    check_weight_fp8(grouped_weight_fp8, "cpu", COUNTS, (130, 70))
    check_weight_fp8(grouped_weight_fp8, "cpu", ONE_GROUP, (16, 128))


@interpreted
def test_interpreted_products_of_groups_in_fp8_carry_nan_and_take_nothing() -> None:
    check_nan_fp8(grouped_rows_fp8, grouped_weight_fp8, "cpu")
    check_empty_fp8(grouped_rows_fp8, grouped_weight_fp8, "cpu")


@interpreted
def test_interpreted_products_of_groups_in_fp8_are_near_the_exact_ones_with_any_tiling() -> None:
    """Blocks of tile rows do not divide the result evenly, and programs process several tiles."""
    for tiling in (Tiling(rows=16, outputs=32, group=3), Tiling(rows=64, outputs=64, specialize=True, group=1)):
        check_rows_fp8(partial(grouped_rows_fp8, tiling=tiling), "cpu", (70, 0, 1), (90, 130), torch.float32)
        check_weight_fp8(partial(grouped_weight_fp8, tiling=tiling), "cpu", (70, 0, 1), (90, 40))


@interpreted
def test_interpreted_products_of_groups_in_fp8_read_any_layout() -> None:
    """Strided, transposed and unaligned operands, surrounded by NaN, are read correctly."""
    counts = (5, 0, 9)
    rows, weights = grouped_operands(counts, 20, 200)
    expected = grouped_rows_fp8(rows, weights, counts, torch.float32)
    for columns in (slice(16, 216), slice(3, 203)):
        wide = torch.full((14, 240), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
        wide[:, columns] = rows.codes
        apart = Quantized(wide[:, columns], torch.cat([rows.scales] * 2, dim=1)[:, 1:3].flip(1))
        matrices = torch.full((3, 22, 240), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
        matrices[:, 1:21, columns] = weights.codes
        scales = weights.scales.transpose(1, 2).contiguous().transpose(1, 2)
        made = grouped_rows_fp8(apart, QuantizedBlocks(matrices[:, 1:21, columns], scales), counts, torch.float32)
        assert torch.equal(made, expected)
    grad, inputs = grouped_column_operands(counts, 20, 24)
    apart_grad = QuantizedColumns(grad.codes.t().contiguous().t(), grad.scales.t().contiguous().t())
    assert torch.equal(grouped_weight_fp8(apart_grad, inputs, counts), grouped_weight_fp8(grad, inputs, counts))


@interpreted
def test_interpreted_tuner_measures_all_candidates_once_for_a_shape_grouped() -> None:
    """Nothing is measured without elements or at odd widths."""
    measured: list[float] = []

    def milliseconds(call: object) -> float:
        measured.append(float(len(measured) + 1))
        return 10 - measured[-1]

    candidates = Tiling(rows=16, outputs=16), Tiling(rows=32, outputs=32)
    of_rows = TunedProduct(grouped_rows_fp8, grouped_tuned.rows_key, candidates, milliseconds)
    of_weight = TunedProduct(grouped_weight_fp8, grouped_tuned.weight_key, candidates, milliseconds)
    lengths = []
    for counts, num_outputs in (((5, 0), 32), ((1, 6), 32), ((9, 0), 32), ((0, 0), 32), ((5, 0), 24)):
        check_rows_fp8(of_rows, "cpu", counts, (num_outputs, 128), torch.bfloat16)
        lengths.append(len(measured))
    for num_inputs in (32, 24):
        check_weight_fp8(of_weight, "cpu", (5, 0), (20, num_inputs))
        lengths.append(len(measured))
    assert lengths == [2, 2, 4, 4, 4, 6, 6]
    assert {*of_rows._chosen.values(), *of_weight._chosen.values()} == {candidates[1]}
    check_rows_fp8(grouped_tuned.grouped_rows_fp8, "cpu", (5, 0), (24, 128), torch.bfloat16)
    assert not grouped_tuned.grouped_rows_fp8._chosen


LARGE_COUNTS = (500, 0, 37, 640)


def compiled_rows_fp8(num_outputs: int, depth: int, dtype: torch.dtype, candidate: int | None) -> Compiled:
    import kernels.gemm.triton_fp8 as module
    from kernels.gemm.tuned import GROUPED_CANDIDATES

    num_rows, num_groups, tiles = sum(LARGE_COUNTS), len(LARGE_COUNTS), -(-depth // 128)
    rows = Quantized(torch.empty(num_rows, depth, dtype=torch.float8_e4m3fn), torch.empty(num_rows, tiles))
    codes = torch.empty(num_groups, num_outputs, depth, dtype=torch.float8_e4m3fn)
    weights = QuantizedBlocks(codes, torch.empty(num_groups, -(-num_outputs // 128), tiles))
    tiling = None if candidate is None else GROUPED_CANDIDATES[candidate]
    launch = partial(module.grouped_rows_fp8, rows, weights, LARGE_COUNTS, dtype, tiling=tiling)
    return compile_launch(module, "grouped_rows_fp8_kernel", launch)


def compiled_weight_fp8(num_outputs: int, num_inputs: int, candidate: int | None) -> Compiled:
    import kernels.gemm.triton_fp8 as module
    from kernels.gemm.tuned import WEIGHT_CANDIDATES

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


def assert_pipelined_compiled(compiled: Compiled, operand: str, depth: int) -> None:
    """Asserts tensor cores, in-place sums, operands loaded ahead by descriptor, and results stored under masks."""
    assert len(compiled.cubin) > 1000
    assert compiled.spill_bytes == 0
    # Addresses in 32 bits are those of shared memory, a row's length being known.
    assert re.findall(r"(?:mul|mad)\.lo\.[su]32\s+%r\d+, %r\d+, %", compiled.ptx) == []
    assert compiled.instructions(r"cp\.async\.bulk\.tensor.*\.global\.shared") == []
    assert_loaded_ahead(compiled, operand, depth)


def assert_loaded_ahead(compiled: Compiled, operand: str, depth: int) -> None:
    """Asserts tensor cores of the type, in-place sums, and operands loaded ahead by descriptor."""
    assert compiled.shared_bytes <= LARGEST_SHARED_BYTES
    products = compiled.instructions(r"wgmma\.mma_async")
    assert products
    name = rf"wgmma\.mma_async\.sync\.aligned\.m64n\d+k{depth}\.f32\.{operand}\.{operand}"
    assert all(re.fullmatch(name, each) for each in products)
    assert compiled.instructions(r"mma\.sync") == []
    assert len(compiled.instructions(r"cp\.async\.bulk\.tensor\.[23]d\.shared")) >= 2
    assert compiled.instructions(r"mbarrier\.try_wait")
    assert compiled.instructions(r".*\.ftz") == []


@pytest.mark.parametrize("candidate", [1, *exhaustive(0, 2, 3)])
def test_compiled_product_of_groups_is_pipelined_with_any_tiling(candidate: int) -> None:
    from kernels.gemm.tuned import GROUPED_CANDIDATES

    compiled = compiled_rows_fp8(4096, 7168, torch.bfloat16, candidate)
    assert_pipelined_compiled(compiled, "e4m3", 32)
    tiling = GROUPED_CANDIDATES[candidate]
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


@pytest.mark.parametrize("candidate", [0, *exhaustive(1, 2, 3)])
def test_compiled_gradient_of_groups_is_pipelined_with_any_tiling(candidate: int) -> None:
    from kernels.gemm.tuned import WEIGHT_CANDIDATES

    compiled = compiled_weight_fp8(4096, 7168, candidate)
    assert_pipelined_compiled(compiled, "e4m3", 32)
    tiling = WEIGHT_CANDIDATES[candidate]
    assert tiling.programs_per_sm * compiled.registers * 32 * compiled.num_warps <= 2**16
    assert tiling.programs_per_sm * (compiled.shared_bytes + 1024) <= LARGEST_SHARED_BYTES + 1024


def test_compiled_products_of_groups_of_odd_width_are_sound() -> None:
    assert_pipelined_compiled(compiled_rows_fp8(131, 200, torch.float32, None), "e4m3", 32)
    assert_pipelined_compiled(compiled_rows_fp8(2056, 128, torch.bfloat16, None), "e4m3", 32)
    assert_pipelined_compiled(compiled_weight_fp8(131, 201, None), "e4m3", 32)
