"""Grouped products against one product per row, and torch's own against the reference."""

from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from kernels.grouped_gemm import native, reference
from kernels.grouped_gemm.reference import grouped_rows, grouped_weight
from tests.kernels.agreement_grouped import check_nan
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
    near(native.grouped_rows(rows, weight, counts), expected, 2)
    # As the backward calls it: a transposed view of the weights.
    expected = reference.grouped_rows(grad.double(), weight.double().transpose(1, 2), counts)
    near(native.grouped_rows(grad, weight.transpose(1, 2), counts), expected, 2)
    expected = reference.grouped_weight(grad.double(), rows.double(), counts)
    near(native.grouped_weight(grad, rows, counts), expected, 2)


def test_native_products_serve_bf16_on_cuda_with_rows_of_whole_16_bytes() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert native.supports(cuda, torch.bfloat16, 16, 8)
    assert not native.supports(cuda, torch.bfloat16, 16, 4)
    assert not native.supports(cuda, torch.float32, 16, 8)
    assert not native.supports(cpu, torch.bfloat16, 16, 8)


def test_reference_keeps_nan_and_infinity_within_their_group() -> None:
    check_nan(grouped_rows, grouped_weight, "cpu")


def test_native_gradient_of_an_empty_group_is_zero(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
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
        torch.testing.assert_close(native.grouped_weight(grad, rows, counts), expected)


@pytest.mark.parametrize("product", [reference, native])
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
