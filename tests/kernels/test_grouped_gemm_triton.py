"""Triton's grouped products: interpreted, near exact ones as float32 allows."""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch

from kernels.quantize.layout import Quantized, QuantizedBlocks, QuantizedColumns
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
from tests.kernels.plain import randn

pytestmark = pytest.mark.slow

COUNTS = (0, 130, 1, 0, 128, 127, 0)
ONE_GROUP = (0, 0, 259)


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
    """Checks that every tiling gives the same product.

    Blocks of tile rows do not divide the result evenly, and programs process several tiles.
    """
    from kernels.gemm_fp8.tiling import Tiling
    from kernels.grouped_gemm.triton_fp8 import grouped_rows_fp8, grouped_weight_fp8

    for tiling in (Tiling(rows=16, outputs=32, group=3), Tiling(rows=64, outputs=64, specialize=True, group=1)):
        check_rows_fp8(partial(grouped_rows_fp8, tiling=tiling), "cpu", (70, 0, 1), (90, 130), torch.float32)
        check_weight_fp8(partial(grouped_weight_fp8, tiling=tiling), "cpu", (70, 0, 1), (90, 40))


def interpreted_fp8_layouts() -> None:
    """Strided, transposed and unaligned operands, surrounded by NaN, are read correctly."""
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
    """Returns how often candidates were measured after each product.

    All are measured at a first product, none later, without elements, or at odd widths.
    """
    from kernels.gemm_fp8.tiling import Tiling
    from kernels.grouped_gemm.tuned import TunedGroupedGemm

    measured: list[float] = []

    def milliseconds(call: object) -> float:
        measured.append(float(len(measured) + 1))
        return 10 - measured[-1]

    candidates = Tiling(rows=16, outputs=16), Tiling(rows=32, outputs=32)
    tuned = TunedGroupedGemm(candidates, candidates, milliseconds)
    lengths = []
    for counts, num_outputs in (((5, 0), 32), ((1, 6), 32), ((9, 0), 32), ((0, 0), 32), ((5, 0), 24)):
        check_rows_fp8(tuned.grouped_rows_fp8, "cpu", counts, (num_outputs, 128), torch.bfloat16)
        lengths.append(len(measured))
    for num_inputs in (32, 24):
        check_weight_fp8(tuned.grouped_weight_fp8, "cpu", (5, 0), (20, num_inputs))
        lengths.append(len(measured))
    assert set(tuned._chosen.values()) == {candidates[1]}
    untuned = TunedGroupedGemm()
    check_rows_fp8(untuned.grouped_rows_fp8, "cpu", (5, 0), (24, 128), torch.bfloat16)
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
    assert interpreter.submit(interpreted_tuner).result() == [2, 2, 4, 4, 4, 6, 6]


def test_misuse_of_grouped_products_is_named(interpreter: ProcessPoolExecutor) -> None:
    assert interpreter.submit(interpreted_misuse).result() == [
        "grouped_rows: the type must be one of bfloat16, float16, float32, got torch.float64; nearest: float32",
        "grouped_rows: counts must add up to the number of rows, 4, got 3",
        "grouped_weight: grad must have as many rows as rows, 4, got 3",
        "GroupedTiling: depth must be a power of two in [16, 256], got 48; nearest: 32",
    ]
