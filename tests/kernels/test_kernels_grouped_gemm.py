"""Grouped products against one product per row, and torch's own against the reference."""

import pytest
import torch

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
    assert native.serves(cuda, torch.bfloat16, 16, 8)
    assert not native.serves(cuda, torch.bfloat16, 16, 4)
    assert not native.serves(cuda, torch.float32, 16, 8)
    assert not native.serves(cpu, torch.bfloat16, 16, 8)


def test_reference_keeps_nan_and_infinity_within_their_group() -> None:
    check_nan(grouped_rows, grouped_weight, "cpu")
