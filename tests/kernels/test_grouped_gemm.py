"""Grouped products, also in FP8, against one product per row, and the package `deep_gemm` emulated."""

import sys
from functools import partial
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from kernels.expert_mlp import grouped
from kernels.gemm import deep_gemm, reference
from kernels.gemm.reference import grouped_rows, grouped_rows_fp8, grouped_weight, grouped_weight_fp8
from kernels.quantize.layout import QuantizedBlocks, QuantizedColumns
from tests.kernels.agreement_grouped import (
    check_empty_fp8,
    check_nan,
    check_nan_fp8,
    check_rows_fp8,
    check_weight_fp8,
    column_operands,
    operands,
)
from tests.kernels.deep_gemm_grouped_emulation import Calls, emulated
from tests.kernels.plain import near, randn, strided

COUNTS = [(3, 0, 4, 1), (0, 0, 8, 0), (0, 0, 0, 0), (2, 2, 2, 2)]


@pytest.mark.parametrize("is_strided", [False, True])
@pytest.mark.parametrize("counts", COUNTS)
def test_grouped_products_equal_row_by_row(counts: tuple[int, ...], is_strided: bool) -> None:
    total = sum(counts)
    rows, grad, weight = randn(total, 5, seed=0), randn(total, 7, seed=1), randn(4, 7, 5, seed=2)
    if is_strided:
        rows, grad, weight = strided(rows), strided(grad), strided(weight)
    groups = [group for group, count in enumerate(counts) for _ in range(count)]
    out = grouped_rows(rows, weight, counts)
    expected_weight = torch.zeros_like(weight)
    for row, group in enumerate(groups):
        torch.testing.assert_close(out[row], weight[group] @ rows[row], rtol=1e-12, atol=1e-13)
        expected_weight[group] += torch.outer(grad[row], rows[row])
    torch.testing.assert_close(grouped_weight(grad, rows, counts), expected_weight, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [*COUNTS, (40, 0, 90, 1)])
def test_native_products_equal_reference(counts: tuple[int, ...], dtype: torch.dtype) -> None:
    total = sum(counts)
    rows, grad, weight = (
        randn(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate([(total, 16), (total, 24), (4, 24, 16)])
    )
    expected = reference.grouped_rows(rows.double(), weight.double(), counts)
    near(grouped.grouped_rows(rows, weight, counts), expected, 2)
    # As the backward calls it: a transposed view of the weights.
    expected = reference.grouped_rows(grad.double(), weight.double().transpose(1, 2), counts)
    near(grouped.grouped_rows(grad, weight.transpose(1, 2), counts), expected, 2)
    expected = reference.grouped_weight(grad.double(), rows.double(), counts)
    near(grouped.grouped_weight(grad, rows, counts), expected, 2)


def test_native_products_serve_bf16_on_cuda_with_rows_of_whole_16_bytes() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert grouped.supports(cuda, torch.bfloat16, 16, 8)
    assert not grouped.supports(cuda, torch.bfloat16, 16, 4)
    assert not grouped.supports(cuda, torch.float32, 16, 8)
    assert not grouped.supports(cpu, torch.bfloat16, 16, 8)


def test_reference_keeps_nan_and_infinity_within_their_group() -> None:
    check_nan(grouped_rows, grouped_weight, "cpu")


def test_native_gradient_of_an_empty_group_is_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaves_empty_groups(left: Tensor, right: Tensor, *, offs: Tensor) -> Tensor:
        assert left.shape[1] > 0
        out = torch.full((len(offs), len(left), right.shape[1]), torch.nan, dtype=left.dtype)
        first = 0
        for group, end in enumerate(offs.tolist()):
            if end > first:
                out[group] = left[:, first:end] @ right[first:end]
            first = end
        return out

    monkeypatch.setattr(functional, "grouped_mm", leaves_empty_groups)
    for counts in COUNTS:
        grad, rows = (randn(sum(counts), size, seed=size) for size in (24, 16))
        expected = reference.grouped_weight(grad, rows, counts)
        torch.testing.assert_close(grouped.grouped_weight(grad, rows, counts), expected)


@pytest.mark.parametrize("product", [reference, grouped])
def test_operands_of_groups_that_do_not_fit_are_named(product: ModuleType) -> None:
    rows, weight, grad = randn(8, 16, seed=0), randn(2, 24, 16, seed=1), randn(8, 24, seed=2)
    for given, rule in (
        ((rows, weight, (3, 4)), "grouped_rows: counts must add up to the number of rows, 8, got 7"),
        ((rows, weight, (9, -1)), "grouped_rows: a count of rows must not be negative, got -1"),
        ((rows, weight, (3, 4, 1)), "grouped_rows: counts must be as many as matrices, 2, got 3"),
        ((rows, weight[:, :, 1:], (3, 5)), "grouped_rows: the matrices must have as many columns as rows, 16, got 15"),
        ((rows, weight.bfloat16(), (3, 5)), "grouped_rows: the matrices must be torch.float64, .*, got torch.bfloat16"),
        ((rows, weight.to("meta"), (3, 5)), "grouped_rows: the matrices must be on cpu, where rows are, got meta"),
    ):
        with pytest.raises(ValueError, match=rule):
            product.grouped_rows(*given)
    for given, rule in (
        ((grad, rows, (3, 4)), "grouped_weight: counts must add up to the number of rows, 8, got 7"),
        ((grad[1:], rows, (3, 5)), "grouped_weight: grad must have as many rows as rows, 8, got 7"),
        ((grad.float(), rows, (3, 5)), "grouped_weight: grad must be torch.float64, .*, got torch.float32"),
    ):
        with pytest.raises(ValueError, match=rule):
            product.grouped_weight(*given)


FP8_COUNTS = [(0, 130, 1, 0, 128, 127, 0), (0, 0, 259), (129, 0, 0), (5,)]


@pytest.mark.parametrize("counts", FP8_COUNTS)
def test_reference_is_each_groups_product_of_codes_times_scales(counts: tuple[int, ...]) -> None:
    check_rows_fp8(grouped_rows_fp8, "cpu", counts, (131, 200), torch.bfloat16)
    check_rows_fp8(grouped_rows_fp8, "cpu", counts, (48, 129), torch.float32)
    check_weight_fp8(grouped_weight_fp8, "cpu", counts, (130, 70))


def test_reference_keeps_nan_within_its_group() -> None:
    check_nan_fp8(grouped_rows_fp8, grouped_weight_fp8, "cpu")


def test_reference_of_nothing_has_its_shapes() -> None:
    check_empty_fp8(grouped_rows_fp8, grouped_weight_fp8, "cpu")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    counted = Calls()
    monkeypatch.setitem(sys.modules, "deep_gemm", emulated(counted))
    return counted


refuse = partial(pytest.fail, "the package serves this shape")


@pytest.mark.parametrize("counts", [*FP8_COUNTS[:3], (128, 0, 256), (1, 200, 63, 65)])
def test_deep_gemm_gets_aligned_groups(calls: Calls, counts: tuple[int, ...]) -> None:
    of_rows, of_weight = (
        partial(product, fallback=refuse) for product in (deep_gemm.grouped_rows_fp8, deep_gemm.grouped_weight_fp8)
    )
    check_rows_fp8(of_rows, "cpu", counts, (192, 256), torch.bfloat16)
    check_weight_fp8(of_weight, "cpu", counts, (64, 192))
    assert calls.num_rows == [sum(-(-count // 128) * 128 for count in counts)]
    assert calls.num_weights == 1


def test_gradients_are_added_to_a_sum_in_its_memory(calls: Calls) -> None:
    """By the package, by its fallback for a sum that it cannot write, and by the reference."""
    counts = (3, 130)
    grad, inputs = column_operands(counts, 64, 128)
    expected = grouped_weight_fp8(grad, inputs, counts) + 1
    for fallback, total in (
        (refuse, torch.ones(2, 64, 128)),
        (grouped_weight_fp8, torch.ones(2, 128, 64).transpose(1, 2)),
    ):
        assert deep_gemm.grouped_weight_fp8(grad, inputs, counts, total=total, fallback=fallback) is total
        torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-3)
    assert calls.num_weights == 1
    total = torch.ones(2, 64, 128)
    assert grouped_weight_fp8(grad, inputs, counts, total=total) is total
    assert torch.equal(total, expected)


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
