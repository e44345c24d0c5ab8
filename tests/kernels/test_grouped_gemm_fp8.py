"""Grouped products in FP8: the reference against exact products, and the package `deep_gemm` emulated."""

import sys
from functools import partial

import pytest
import torch

from kernels.grouped_gemm import deep_gemm
from kernels.grouped_gemm.reference import grouped_rows_fp8, grouped_weight_fp8
from kernels.quantize.layout import Quantized, QuantizedBlocks, QuantizedColumns, pack, unpack
from kernels.quantize.reference import quantize_1x128, quantize_128x128
from kernels.quantize.reference_columns import quantize_columns
from tests.kernels.agreement_grouped import (
    check_empty_fp8,
    check_nan_fp8,
    check_rows_fp8,
    check_weight_fp8,
    column_operands,
    operands,
)
from tests.kernels.deep_gemm_grouped_emulation import Calls, emulated
from tests.kernels.plain import randn

COUNTS = [(0, 130, 1, 0, 128, 127, 0), (0, 0, 259), (129, 0, 0), (5,)]


@pytest.mark.parametrize("counts", COUNTS)
def test_reference_is_each_groups_product_of_codes_times_scales(counts: tuple[int, ...]) -> None:
    check_rows_fp8(grouped_rows_fp8, "cpu", counts, (131, 200), torch.bfloat16)
    check_rows_fp8(grouped_rows_fp8, "cpu", counts, (48, 129), torch.float32)
    check_weight_fp8(grouped_weight_fp8, "cpu", counts, (130, 70))


def test_reference_keeps_nan_within_its_group() -> None:
    check_nan_fp8(grouped_rows_fp8, grouped_weight_fp8, "cpu")


def test_reference_of_nothing_has_its_shapes() -> None:
    check_empty_fp8(grouped_rows_fp8, grouped_weight_fp8, "cpu")


def test_products_of_quantized_groups_are_near_those_of_the_groups() -> None:
    counts = [70, 0, 130]
    rows, weight, grad = randn(200, 300, seed=0), randn(3, 140, 300, seed=1), randn(200, 140, seed=2)
    made = grouped_rows_fp8(
        quantize_1x128(rows, power_of_two=True), quantize_128x128(weight, power_of_two=False), counts, torch.float32
    )
    gradient = grouped_weight_fp8(
        quantize_columns(grad, counts, power_of_two=True), quantize_columns(rows, counts, power_of_two=False), counts
    )
    parts = (slice(0, 70), slice(70, 70), slice(70, 200))
    expected = torch.cat([rows[part] @ matrix.t() for part, matrix in zip(parts, weight, strict=True)])
    expected_gradient = torch.stack([grad[part].t() @ rows[part] for part in parts])
    # A code has four significant bits: uniformly up to 1/16 of a value, 0.026 at the mean, for either operand.
    assert 0.01 < (made - expected).norm() / expected.norm() < 0.05
    assert 0.01 < (gradient - expected_gradient).norm() / expected_gradient.norm() < 0.05


def test_operands_that_do_not_fit_are_named() -> None:
    rows, weights = operands((3, 4), 140, 200)
    wrong = [
        (rows, QuantizedBlocks(weights.codes[0], weights.scales), (3, 4), "the matrices must have 3 dimensions, got 2"),
        (rows, QuantizedBlocks(weights.codes[:, :, 1:], weights.scales), (3, 4), "as many columns as rows, 200, got 1"),
        (rows, weights, (7,), "counts must be as many as matrices, 2, got 1"),
        (rows, weights, (3, 5), "counts must add up to the number of rows, 7, got 8"),
        (rows, weights, (8, -1), "a count of rows must not be negative, got -1; nearest: 0"),
        (Quantized(rows.codes, rows.scales[1:]), weights, (3, 4), r"rows.scales must be \[7, 2\], got \[6, 2\]"),
        (rows, QuantizedBlocks(weights.codes, weights.scales[:1]), (3, 4), r"must be \[2, 2, 2\], got \[1, 2, 2\]"),
    ]
    for left, right, counts, message in wrong:
        with pytest.raises(ValueError, match="grouped_rows_fp8: .*" + message):
            grouped_rows_fp8(left, right, counts, torch.float32)
    grad, inputs = column_operands((3, 4), 40, 50)
    with pytest.raises(ValueError, match="grouped_weight_fp8: codes must have 128 columns, as counts fill up to, got"):
        grouped_weight_fp8(grad, inputs, (3,))
    with pytest.raises(ValueError, match="grouped_weight_fp8: a count of rows must not be negative"):
        grouped_weight_fp8(grad, inputs, (256, -1))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    counted = Calls()
    monkeypatch.setitem(sys.modules, "deep_gemm", emulated(counted))
    return counted


refuse = partial(pytest.fail, "the package serves this shape")


@pytest.mark.parametrize("counts", [*COUNTS[:3], (128, 0, 256), (1, 200, 63, 65)])
def test_deep_gemm_gets_aligned_groups(calls: Calls, counts: tuple[int, ...]) -> None:
    of_rows, of_weight = (
        partial(product, fallback=refuse) for product in (deep_gemm.grouped_rows_fp8, deep_gemm.grouped_weight_fp8)
    )
    check_rows_fp8(of_rows, "cpu", counts, (192, 256), torch.bfloat16)
    check_weight_fp8(of_weight, "cpu", counts, (64, 192))
    assert calls.num_rows == [sum(-(-count // 128) * 128 for count in counts)]
    assert calls.num_weights == 1


@pytest.mark.parametrize("counts", [(3, 130), (128, 256)])
def test_deep_gemm_takes_rows_out_of_a_message(calls: Calls, counts: tuple[int, ...]) -> None:
    product = partial(deep_gemm.grouped_rows_fp8, counts=counts, dtype=torch.bfloat16, fallback=refuse)
    rows, weights = operands(counts, 64, 256)
    assert torch.equal(product(unpack(pack(rows), 256), weights), product(rows, weights))
    assert len(calls.num_rows) == 2


def test_deep_gemm_keeps_nan_within_its_group(calls: Calls) -> None:
    rows, weights = operands((3, 130), 64, 128)
    rows.scales[0] = torch.nan
    made = deep_gemm.grouped_rows_fp8(rows, weights, (3, 130), torch.bfloat16, fallback=refuse)
    assert torch.equal(made.isnan().any(1), torch.arange(133) == 0)


def test_what_deep_gemm_is_not_made_for_goes_elsewhere(calls: Calls) -> None:
    of_rows = partial(deep_gemm.grouped_rows_fp8, fallback=grouped_rows_fp8)
    of_weight = partial(deep_gemm.grouped_weight_fp8, fallback=grouped_weight_fp8)
    check_rows_fp8(of_rows, "cpu", (3, 130), (64, 128), torch.float32)
    check_rows_fp8(of_rows, "cpu", (3, 130), (100, 128), torch.bfloat16)
    check_rows_fp8(of_rows, "cpu", (3, 130), (64, 200), torch.bfloat16)
    check_weight_fp8(of_weight, "cpu", (3, 130), (64, 100))
    check_empty_fp8(of_rows, of_weight, "cpu")
    rows, weights = operands((3, 130), 64, 256)
    assert deep_gemm.supports_rows(rows, weights, torch.bfloat16)
    across = QuantizedBlocks(weights.codes.transpose(1, 2).contiguous().transpose(1, 2), weights.scales)
    of_rows(rows, across, (3, 130), torch.bfloat16)
    grad, inputs = column_operands((3, 130), 64, 128)
    assert deep_gemm.supports_weight(grad, inputs)
    apart = QuantizedColumns(inputs.codes.t().contiguous().t(), inputs.scales)
    assert torch.equal(of_weight(grad, apart, (3, 130)), grouped_weight_fp8(grad, inputs, (3, 130)))
    assert (calls.num_rows, calls.num_weights) == ([], 0)
