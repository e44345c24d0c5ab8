"""Triton's grouped products: interpreted, near exact ones as float32 allows."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch

from kernels.gemm_fp8.tiling import Tiling
from kernels.gemm_fp8.tuned import TunedProduct
from kernels.grouped_gemm import reference, tuned
from kernels.grouped_gemm.tiles import GroupedTiling
from kernels.grouped_gemm.triton import grouped_rows, grouped_weight
from kernels.grouped_gemm.triton_fp8 import grouped_rows_fp8, grouped_weight_fp8
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
from tests.kernels.interpreter_casts import interpreted
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


@interpreted
def test_interpreted_products_of_groups_in_fp8_are_near_the_exact_ones() -> None:
    check_rows_fp8(grouped_rows_fp8, "cpu", COUNTS, (131, 200), torch.bfloat16)
    check_rows_fp8(grouped_rows_fp8, "cpu", ONE_GROUP, (48, 129), torch.float32)
    check_rows_fp8(grouped_rows_fp8, "cpu", (129, 0), (256, 128), torch.float32)
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


@interpreted
def test_interpreted_products_of_groups_in_16_bits_are_near_the_exact_ones() -> None:
    with dots_of_bfloat16():
        for across in (False, True):
            check_rows(grouped_rows, "cpu", COUNTS, (131, 72), torch.bfloat16, across)
        check_rows(grouped_rows, "cpu", ONE_GROUP, (24, 17), torch.bfloat16, True)
        check_weight(grouped_weight, "cpu", COUNTS, (130, 73), torch.bfloat16)
        check_weight(grouped_weight, "cpu", ONE_GROUP, (16, 24), torch.bfloat16)
        check_nan(grouped_rows, grouped_weight, "cpu")


@interpreted
def test_interpreted_products_of_groups_in_other_types_are_near_the_exact_ones() -> None:
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


@interpreted
def test_interpreted_products_of_groups_of_nothing_have_their_shapes() -> None:
    shapes: list[tuple[tuple[int, ...], int, int]] = [((0, 0), 5, 7), ((2, 3), 0, 7), ((2, 3), 5, 0), ((), 5, 7)]
    for counts, num_outputs, depth in shapes:
        rows, weight = torch.ones(sum(counts), depth), torch.ones(len(counts), num_outputs, depth)
        assert grouped_rows(rows, weight, counts).equal(torch.zeros(sum(counts), num_outputs))
        made = grouped_weight(rows.new_ones(len(rows), num_outputs), rows, counts)
        assert made.shape == weight.shape
        assert counts == (2, 3) or not made.any()


@interpreted
def test_interpreted_tuner_measures_all_candidates_once_for_a_shape() -> None:
    """Nothing is measured without elements or at odd widths."""
    measured: list[float] = []

    def milliseconds(call: object) -> float:
        measured.append(float(len(measured) + 1))
        return 10 - measured[-1]

    candidates = Tiling(rows=16, outputs=16), Tiling(rows=32, outputs=32)
    of_rows = TunedProduct(grouped_rows_fp8, tuned.rows_key, candidates, milliseconds)
    of_weight = TunedProduct(grouped_weight_fp8, tuned.weight_key, candidates, milliseconds)
    lengths = []
    for counts, num_outputs in (((5, 0), 32), ((1, 6), 32), ((9, 0), 32), ((0, 0), 32), ((5, 0), 24)):
        check_rows_fp8(of_rows, "cpu", counts, (num_outputs, 128), torch.bfloat16)
        lengths.append(len(measured))
    for num_inputs in (32, 24):
        check_weight_fp8(of_weight, "cpu", (5, 0), (20, num_inputs))
        lengths.append(len(measured))
    assert lengths == [2, 2, 4, 4, 4, 6, 6]
    assert {*of_rows._chosen.values(), *of_weight._chosen.values()} == {candidates[1]}
    check_rows_fp8(tuned.grouped_rows_fp8, "cpu", (5, 0), (24, 128), torch.bfloat16)
    assert not tuned.grouped_rows_fp8._chosen
