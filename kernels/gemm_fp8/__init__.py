"""Multiplies matrices in FP8.

`implementation`: None selects the default for the operands' device. Shape legend: as in kernels/gemm_fp8/reference.py.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Protocol, assert_never

from kernels.implementation import Implementation, choose_product_implementation

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kernels.quantize.layout import Quantized, QuantizedBlocks, QuantizedColumns


def gemm_fp8(
    left: Quantized, right: QuantizedBlocks, dtype: torch.dtype, *, implementation: Implementation | None = None
) -> Tensor:
    """Multiplies by a weight, left right^T, MN, as `kernels.gemm_fp8.reference.gemm_fp8` does."""
    products = _products(implementation or choose_product_implementation(left.codes.device))
    return products.gemm_fp8(left, right, dtype)


def gemm_fp8_columns(
    left: QuantizedColumns, right: QuantizedColumns, *, implementation: Implementation | None = None
) -> Tensor:
    """Multiplies over the rows of all groups, left right^T, MN in float32, as the reference does."""
    products = _products(implementation or choose_product_implementation(left.codes.device))
    return products.gemm_fp8_columns(left, right)


class _Products(Protocol):
    def gemm_fp8(self, left: Quantized, right: QuantizedBlocks, dtype: torch.dtype) -> Tensor: ...

    def gemm_fp8_columns(self, left: QuantizedColumns, right: QuantizedColumns) -> Tensor: ...


@cache
def _products(implementation: Implementation) -> _Products:
    """Returns an implementation, which caches the tilings that its tuner chose."""
    match implementation:
        case "reference":
            from kernels.gemm_fp8 import reference

            return reference
        case "triton":
            from kernels.gemm_fp8.tuned import TunedGemm

            return TunedGemm()
        case "deep_gemm":
            from kernels.gemm_fp8.deep_gemm import DeepGemm

            tuned = _products("triton")
            return DeepGemm(tuned.gemm_fp8, tuned.gemm_fp8_columns)
        case _:
            assert_never(implementation)
