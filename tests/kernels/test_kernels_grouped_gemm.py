"""Grouped products against one product per row."""

import pytest
import torch

from kernels.grouped_gemm.reference import grouped_rows, grouped_weight


@pytest.mark.parametrize("counts", [(3, 0, 4, 1), (0, 0, 8, 0), (0, 0, 0, 0), (2, 2, 2, 2)])
def test_grouped_products_equal_row_by_row(counts: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    total = sum(counts)
    rows = torch.randn(total, 5, generator=generator, dtype=torch.float64)
    grad = torch.randn(total, 7, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, 7, 5, generator=generator, dtype=torch.float64)
    groups = [group for group, count in enumerate(counts) for _ in range(count)]
    out = grouped_rows(rows, weight, counts)
    expected_weight = torch.zeros_like(weight)
    for row, group in enumerate(groups):
        torch.testing.assert_close(out[row], weight[group] @ rows[row], rtol=1e-12, atol=1e-13)
        expected_weight[group] += torch.outer(grad[row], rows[row])
    torch.testing.assert_close(grouped_weight(grad, rows, counts), expected_weight, rtol=1e-12, atol=1e-13)
