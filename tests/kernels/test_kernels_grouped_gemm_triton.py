"""Triton's grouped products: interpreted, near exact ones as float32 allows; compiled for sm_90, as they must be."""

import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch

from kernels.quantize.layout import Quantized, QuantizedBlocks, QuantizedColumns, padded_rows
from tests.kernels.agreement_grouped import (
    check_empty_fp8,
    check_nan,
    check_nan_fp8,
    check_rows,
    check_rows_fp8,
    check_weight,
    check_weight_fp8,
    column_operands,
    operands,
)
from tests.kernels.aot import Compiled, compile_launch
from tests.kernels.plain import randn

pytestmark = pytest.mark.slow

COUNTS = (0, 130, 1, 0, 128, 127, 0)
ONE_GROUP = (0, 0, 259)
LARGE_COUNTS = (500, 0, 37, 640)
LARGEST_SHARED_BYTES = 227 * 1024


@contextmanager
def dots_of_bfloat16() -> Iterator[None]:
    """Triton's interpreter multiplies the bits of bfloat16 as integers: here as the numbers that they stand for."""
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


def interpreted_fp8() -> None:
    from kernels.grouped_gemm.triton_fp8 import grouped_rows_fp8, grouped_weight_fp8

    check_rows_fp8(grouped_rows_fp8, "cpu", COUNTS, (131, 200), torch.bfloat16)
    check_rows_fp8(grouped_rows_fp8, "cpu", ONE_GROUP, (48, 129), torch.float32)
    check_rows_fp8(grouped_rows_fp8, "cpu", (129, 0), (256, 128), torch.float32)
    check_weight_fp8(grouped_weight_fp8, "cpu", COUNTS, (130, 70))
    check_weight_fp8(grouped_weight_fp8, "cpu", ONE_GROUP, (16, 128))


def interpreted_fp8_corners() -> None:
    from kernels.grouped_gemm.triton_fp8 import grouped_rows_fp8, grouped_weight_fp8

    check_nan_fp8(grouped_rows_fp8, grouped_weight_fp8, "cpu")
    check_empty_fp8(grouped_rows_fp8, grouped_weight_fp8, "cpu")


def interpreted_fp8_tilings() -> None:
    """Any tiling gives the same product: blocks of tile rows that do not divide up, and several tiles to a program."""
    from kernels.gemm_fp8.tiling import Tiling
    from kernels.grouped_gemm.triton_fp8 import grouped_rows_fp8, grouped_weight_fp8

    for tiling in (Tiling(rows=16, outputs=32, group=3), Tiling(rows=64, outputs=64, specialize=True, group=1)):
        check_rows_fp8(partial(grouped_rows_fp8, tiling=tiling), "cpu", (70, 0, 1), (90, 130), torch.float32)
        check_weight_fp8(partial(grouped_weight_fp8, tiling=tiling), "cpu", (70, 0, 1), (90, 40))


def interpreted_fp8_layouts() -> None:
    """Operands that lie apart, across or at odd addresses, NaN around them, are read as what they are."""
    from kernels.grouped_gemm.triton_fp8 import grouped_rows_fp8, grouped_weight_fp8

    counts = (5, 0, 9)
    rows, weights = operands(counts, 20, 200)
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
    grad, inputs = column_operands(counts, 20, 24)
    apart_grad = QuantizedColumns(grad.codes.t().contiguous().t(), grad.scales.t().contiguous().t())
    assert torch.equal(grouped_weight_fp8(apart_grad, inputs, counts), grouped_weight_fp8(grad, inputs, counts))


def interpreted_16_bits() -> None:
    from kernels.grouped_gemm.triton import grouped_rows, grouped_weight

    with dots_of_bfloat16():
        for across in (False, True):
            check_rows(grouped_rows, "cpu", COUNTS, (131, 72), torch.bfloat16, across)
        check_rows(grouped_rows, "cpu", ONE_GROUP, (24, 17), torch.bfloat16, True)
        check_weight(grouped_weight, "cpu", COUNTS, (130, 73), torch.bfloat16)
        check_weight(grouped_weight, "cpu", ONE_GROUP, (16, 24), torch.bfloat16)
        check_nan(grouped_rows, grouped_weight, "cpu")


def interpreted_other_types() -> None:
    from kernels.grouped_gemm import reference
    from kernels.grouped_gemm.tiling import GroupedTiling
    from kernels.grouped_gemm.triton import grouped_rows, grouped_weight

    check_rows(grouped_rows, "cpu", (70, 0, 1), (90, 40), torch.float32, True)
    check_weight(grouped_weight, "cpu", (70, 0, 1), (90, 40), torch.float32)
    tiling = GroupedTiling(rows=32, columns=16, depth=16, height=2)
    rows, weight = randn(71, 40, seed=0, dtype=torch.float16), randn(3, 90, 40, seed=1, dtype=torch.float16)
    made = grouped_rows(rows, weight, (70, 0, 1), tiling=tiling)
    assert made.dtype == torch.float16
    expected = reference.grouped_rows(rows.double(), weight.double(), (70, 0, 1))
    torch.testing.assert_close(made.double(), expected, rtol=2.0**-11, atol=2.0**-14)
    gradient = grouped_weight(made, rows, (70, 0, 1), tiling=tiling)
    expected = reference.grouped_weight(made.double(), rows.double(), (70, 0, 1))
    torch.testing.assert_close(gradient.double(), expected, rtol=2.0**-11, atol=2.0**-12)


def interpreted_empty() -> None:
    from kernels.grouped_gemm.triton import grouped_rows, grouped_weight

    shapes: list[tuple[tuple[int, ...], int, int]] = [((0, 0), 5, 7), ((2, 3), 0, 7), ((2, 3), 5, 0), ((), 5, 7)]
    for counts, num_outputs, depth in shapes:
        rows, weight = torch.ones(sum(counts), depth), torch.ones(len(counts), num_outputs, depth)
        assert grouped_rows(rows, weight, counts).equal(torch.zeros(sum(counts), num_outputs))
        made = grouped_weight(rows.new_ones(len(rows), num_outputs), rows, counts)
        assert made.shape == weight.shape
        assert counts == (2, 3) or not made.any()


def interpreted_tuner() -> list[int]:
    """How often a candidate was measured: all of them at a first product, nothing after that or without elements."""
    from kernels.gemm_fp8.tiling import Tiling
    from kernels.grouped_gemm.tuned import TunedGroupedGemm

    measured: list[float] = []

    def milliseconds(call: object) -> float:
        measured.append(float(len(measured) + 1))
        return 10 - measured[-1]

    candidates = Tiling(rows=16, outputs=16), Tiling(rows=32, outputs=32)
    tuned = TunedGroupedGemm(candidates, candidates, milliseconds)
    lengths = []
    for counts in ((5, 0), (1, 6), (9, 0), (0, 0)):
        check_rows_fp8(tuned.grouped_rows_fp8, "cpu", counts, (20, 128), torch.bfloat16)
        lengths.append(len(measured))
    check_weight_fp8(tuned.grouped_weight_fp8, "cpu", (5, 0), (20, 24))
    lengths.append(len(measured))
    assert set(tuned._chosen.values()) == {candidates[1]}
    untuned = TunedGroupedGemm()
    check_rows_fp8(untuned.grouped_rows_fp8, "cpu", (5, 0), (20, 128), torch.bfloat16)
    assert not untuned._chosen
    return lengths


def interpreted_misuse() -> list[str]:
    from kernels.grouped_gemm.tiling import GroupedTiling
    from kernels.grouped_gemm.triton import grouped_rows, grouped_weight

    rows, weight = torch.ones(4, 5), torch.ones(2, 3, 5)
    messages = []
    for misuse in (
        lambda: grouped_rows(rows.double(), weight.double(), (1, 3)),
        lambda: grouped_rows(rows, weight, (1, 2)),
        lambda: grouped_weight(rows[:3], rows, (1, 3)),
        lambda: GroupedTiling(depth=48),
    ):
        try:
            misuse()
            messages.append("nothing was raised")
        except ValueError as error:
            messages.append(str(error))
    return messages


INTERPRETED = [
    interpreted_fp8,
    interpreted_fp8_corners,
    interpreted_fp8_tilings,
    interpreted_fp8_layouts,
    interpreted_16_bits,
    interpreted_other_types,
    interpreted_empty,
]


@pytest.mark.parametrize("check", INTERPRETED)
def test_interpreted_products_of_groups_are_near_the_exact_ones(interpreter: ProcessPoolExecutor, check: Any) -> None:
    interpreter.submit(check).result()


def test_tuner_measures_all_candidates_once_for_a_shape(interpreter: ProcessPoolExecutor) -> None:
    assert interpreter.submit(interpreted_tuner).result() == [2, 2, 4, 4, 6]


def test_misuse_of_grouped_products_is_named(interpreter: ProcessPoolExecutor) -> None:
    assert interpreter.submit(interpreted_misuse).result() == [
        "grouped_rows: the type must be one of bfloat16, float16, float32, got torch.float64; nearest: float32",
        "grouped_rows: counts must add up to the number of rows, 4, got 3",
        "grouped_weight: grad must have as many rows as rows, 4, got 3",
        "GroupedTiling: depth must be a power of two in [16, 256], got 48; nearest: 32",
    ]


def compiled_rows_fp8(num_outputs: int, depth: int, dtype: torch.dtype, candidate: int | None) -> Compiled:
    import kernels.grouped_gemm.triton_fp8 as module
    from kernels.grouped_gemm.tuned import CANDIDATES

    num_rows, num_groups, tiles = sum(LARGE_COUNTS), len(LARGE_COUNTS), -(-depth // 128)
    rows = Quantized(torch.empty(num_rows, depth, dtype=torch.float8_e4m3fn), torch.empty(num_rows, tiles))
    codes = torch.empty(num_groups, num_outputs, depth, dtype=torch.float8_e4m3fn)
    weights = QuantizedBlocks(codes, torch.empty(num_groups, -(-num_outputs // 128), tiles))
    tiling = module.OF_ROWS if candidate is None else CANDIDATES[candidate]
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
    tiling = module.OF_WEIGHT if candidate is None else WEIGHT_CANDIDATES[candidate]
    launch = partial(module.grouped_weight_fp8, grad, rows, LARGE_COUNTS, tiling=tiling)
    return compile_launch(module, "grouped_weight_fp8_kernel", launch)


def assert_pipelined(compiled: Compiled, operand: str, depth: int) -> None:
    """On the tensor cores, in place, operands by descriptor and ahead of use; results under masks alone."""
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
    assert_pipelined(compiled_rows_fp8(131, 200, dtype, None), "e4m3", 32)
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


@pytest.mark.parametrize(("num_outputs", "across"), [(4096, False), (4096, True), (4097, False), (4097, True)])
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
