"""Multiplies rows sorted by group, with one matrix per group, in the rows' type or in FP8.

`implementation`: None selects the default for the operands' device.
Shape legend: as in kernels/grouped_gemm/reference.py.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Literal, Protocol, assert_never

from kernels.implementation import Implementation, choose_product_implementation, is_reference

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor

    from kernels.quantize.layout import Quantized, QuantizedBlocks, QuantizedColumns


def grouped_rows(
    rows_AK: Tensor,
    weight_ENK: Tensor,
    counts: Sequence[int],
    *,
    implementation: Implementation | Literal["native"] | None = None,
) -> Tensor:
    """Multiplies each group's rows by the transpose of its matrix, AN, as `reference.grouped_rows` does.

    `implementation`: `native` is torch's own grouped product, for CUDA and bf16.
    """
    if implementation == "native":
        from kernels.grouped_gemm import native

        return native.grouped_rows(rows_AK, weight_ENK, counts)
    if is_reference(implementation, rows_AK.device):
        from kernels.grouped_gemm import reference

        return reference.grouped_rows(rows_AK, weight_ENK, counts)
    from kernels.grouped_gemm import triton

    return triton.grouped_rows(rows_AK, weight_ENK, counts)


def grouped_weight(
    grad_AN: Tensor,
    rows_AK: Tensor,
    counts: Sequence[int],
    *,
    implementation: Implementation | Literal["native"] | None = None,
) -> Tensor:
    """Computes the gradient of each group's matrix, ENK, as `reference.grouped_weight` does."""
    if implementation == "native":
        from kernels.grouped_gemm import native

        return native.grouped_weight(grad_AN, rows_AK, counts)
    if is_reference(implementation, grad_AN.device):
        from kernels.grouped_gemm import reference

        return reference.grouped_weight(grad_AN, rows_AK, counts)
    from kernels.grouped_gemm import triton

    return triton.grouped_weight(grad_AN, rows_AK, counts)


def grouped_rows_fp8(
    rows: Quantized,
    weights: QuantizedBlocks,
    counts: Sequence[int],
    dtype: torch.dtype,
    *,
    implementation: Implementation | None = None,
) -> Tensor:
    """Multiplies groups of FP8 rows by their matrices, AN, as `reference_fp8.grouped_rows_fp8` does."""
    products = _products(implementation or choose_product_implementation(rows.codes.device))
    return products.grouped_rows_fp8(rows, weights, counts, dtype)


def grouped_weight_fp8(
    grad: QuantizedColumns,
    rows: QuantizedColumns,
    counts: Sequence[int],
    *,
    implementation: Implementation | None = None,
) -> Tensor:
    """Computes the gradient of each group's matrix, ENK, as `reference_fp8.grouped_weight_fp8` does."""
    products = _products(implementation or choose_product_implementation(grad.codes.device))
    return products.grouped_weight_fp8(grad, rows, counts)


class _Products(Protocol):
    def grouped_rows_fp8(
        self, rows: Quantized, weights: QuantizedBlocks, counts: Sequence[int], dtype: torch.dtype
    ) -> Tensor: ...

    def grouped_weight_fp8(self, grad: QuantizedColumns, rows: QuantizedColumns, counts: Sequence[int]) -> Tensor: ...


@cache
def _products(implementation: Implementation) -> _Products:
    """Returns an implementation of products in FP8, which caches the tilings that its tuner chose."""
    match implementation:
        case "reference":
            from kernels.grouped_gemm import reference_fp8

            return reference_fp8
        case "triton":
            from kernels.grouped_gemm.tuned import TunedGroupedGemm

            return TunedGroupedGemm()
        case "deep_gemm":
            from kernels.grouped_gemm.deep_gemm import DeepGemmGrouped

            tuned = _products("triton")
            return DeepGemmGrouped(tuned.grouped_rows_fp8, tuned.grouped_weight_fp8)
        case _:
            assert_never(implementation)
