"""Which implementation of the FP8 kernels runs is an argument: the reference in plain PyTorch, or Triton's.

Products can also be those of the package `deep_gemm`, where it takes the operands.

Shape legend: A rows, N outputs, K inputs, D columns, H = 2 M gate and up side by side, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, Protocol, assert_never

import torch
from torch import Tensor

from kernels.protocols import Quantize
from kernels.quantize.layout import PackedE5M6, Quantized, QuantizedBlocks, QuantizedColumns

Fp8Implementation = Literal["reference", "triton", "deep_gemm"]


class QuantizeColumns(Protocol):
    """`kernels.quantize.reference_columns.quantize_columns` or its like."""

    def __call__(
        self, rows_ND: Tensor, counts: Sequence[int], power_of_two: bool, min_amax: float = 1e-4
    ) -> QuantizedColumns:
        """Codes and scales of the transpose, by 128 rows of a group."""


class RequantizeColumns(Protocol):
    """`kernels.quantize.reference_columns.requantize_columns` or its like."""

    def __call__(
        self, quantized: Quantized, counts: Sequence[int], power_of_two: bool, min_amax: float = 1e-4
    ) -> QuantizedColumns:
        """As `QuantizeColumns`, of rows that are in FP8 already."""


class QuantizeBlocks(Protocol):
    """`kernels.quantize.reference_blocks.quantize_128x128` or its like."""

    def __call__(self, values: Tensor, power_of_two: bool, min_amax: float = 1e-4) -> QuantizedBlocks:
        """Codes and scales of a weight, or of several."""


class TransposeBlocks(Protocol):
    """`kernels.quantize.reference_blocks.transpose_blocks` or its like."""

    def __call__(self, quantized: QuantizedBlocks) -> QuantizedBlocks:
        """The transpose."""


class PackE5M6(Protocol):
    """`kernels.quantize.reference_e5m6.pack_e5m6` or its like."""

    def __call__(self, rows_ND: Tensor) -> PackedE5M6:
        """Rows in 12 bits a number."""


class UnpackE5M6(Protocol):
    """`kernels.quantize.reference_e5m6.unpack_e5m6` or its like."""

    def __call__(self, packed: PackedE5M6, num_columns: int, dtype: torch.dtype) -> Tensor:
        """rows_ND."""


class GemmFp8(Protocol):
    """`kernels.gemm_fp8.reference.gemm_fp8` or its like."""

    def __call__(self, left: Quantized, right: QuantizedBlocks, dtype: torch.dtype) -> Tensor:
        """left right^T, AN."""


class GemmFp8Columns(Protocol):
    """`kernels.gemm_fp8.reference.gemm_fp8_columns` or its like."""

    def __call__(self, left: QuantizedColumns, right: QuantizedColumns) -> Tensor:
        """left right^T in float32, NK."""


class GroupedRowsFp8(Protocol):
    """`kernels.grouped_gemm.reference_fp8.grouped_rows_fp8` or its like."""

    def __call__(self, rows: Quantized, weights: QuantizedBlocks, counts: Sequence[int], dtype: torch.dtype) -> Tensor:
        """AN."""


class GroupedWeightFp8(Protocol):
    """`kernels.grouped_gemm.reference_fp8.grouped_weight_fp8` or its like."""

    def __call__(self, grad: QuantizedColumns, rows: QuantizedColumns, counts: Sequence[int]) -> Tensor:
        """ENK in float32."""


class SwigluQuantize(Protocol):
    """`kernels.swiglu.reference_fp8.swiglu_quantize` or its like."""

    def __call__(self, hidden_AH: Tensor, weights_A: Tensor | None, power_of_two: bool) -> tuple[Quantized, Quantized]:
        """What the gate lets through, times the weight, in FP8; and the hidden values in FP8."""


class SwigluBackwardFromCodes(Protocol):
    """`kernels.swiglu.reference_fp8.swiglu_backward_from_codes` or its like."""

    def __call__(
        self, grad_AM: Tensor, hidden: Quantized, weights_A: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """grad_hidden_AH, gated_AM, grad_weights_A."""


class RmsNormQuantize(Protocol):
    """`kernels.rms_norm.reference_fp8.rms_norm_quantize` or its like."""

    def __call__(self, x_AD: Tensor, weight_D: Tensor, eps: float, power_of_two: bool) -> tuple[Quantized, Tensor]:
        """The norm of x in FP8, and the inverse root mean squares, [A, 1]."""


class RmsNormBackwardFromCodes(Protocol):
    """`kernels.rms_norm.reference_fp8.rms_norm_backward_from_codes` or its like."""

    def __call__(
        self, grad_AD: Tensor, normal: Quantized, inverse_A1: Tensor, weight_D: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients of x, AD, and of the weight, D in float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fp8Kernels:
    """All that a model in FP8 is computed with."""

    quantize_1x128: Quantize
    quantize_columns: QuantizeColumns
    requantize_columns: RequantizeColumns
    quantize_128x128: QuantizeBlocks
    transpose_blocks: TransposeBlocks
    pack_e5m6: PackE5M6
    unpack_e5m6: UnpackE5M6
    gemm_fp8: GemmFp8
    gemm_fp8_columns: GemmFp8Columns
    grouped_rows_fp8: GroupedRowsFp8
    grouped_weight_fp8: GroupedWeightFp8
    swiglu_quantize: SwigluQuantize
    swiglu_backward_from_codes: SwigluBackwardFromCodes
    rms_norm_quantize: RmsNormQuantize
    rms_norm_backward_from_codes: RmsNormBackwardFromCodes


def fp8_implementation_for(device: torch.device) -> Fp8Implementation:
    """On CUDA Triton's, with DeepGEMM's products where that package is installed and made for the device."""
    if device.type != "cuda":
        return "reference"
    return "deep_gemm" if _has_deep_gemm(device) else "triton"


@cache
def _has_deep_gemm(device: torch.device) -> bool:
    from kernels.gemm_fp8.deep_gemm import available

    return available(device)


def fp8_kernels(implementation: Fp8Implementation) -> Fp8Kernels:
    """Those of one implementation; imports Triton only where asked for."""
    match implementation:
        case "reference":
            return _reference()
        case "triton":
            return _triton()
        case "deep_gemm":
            return _deep_gemm()
        case _:
            assert_never(implementation)


@cache
def _reference() -> Fp8Kernels:
    import kernels.gemm_fp8.reference as gemm
    import kernels.grouped_gemm.reference_fp8 as grouped
    import kernels.quantize.reference as rows
    import kernels.quantize.reference_blocks as blocks
    import kernels.quantize.reference_columns as columns
    import kernels.quantize.reference_e5m6 as e5m6
    import kernels.rms_norm.reference_fp8 as rms_norm
    import kernels.swiglu.reference_fp8 as swiglu

    return Fp8Kernels(
        quantize_1x128=rows.quantize_1x128,
        quantize_columns=columns.quantize_columns,
        requantize_columns=columns.requantize_columns,
        quantize_128x128=blocks.quantize_128x128,
        transpose_blocks=blocks.transpose_blocks,
        pack_e5m6=e5m6.pack_e5m6,
        unpack_e5m6=e5m6.unpack_e5m6,
        gemm_fp8=gemm.gemm_fp8,
        gemm_fp8_columns=gemm.gemm_fp8_columns,
        grouped_rows_fp8=grouped.grouped_rows_fp8,
        grouped_weight_fp8=grouped.grouped_weight_fp8,
        swiglu_quantize=swiglu.swiglu_quantize,
        swiglu_backward_from_codes=swiglu.swiglu_backward_from_codes,
        rms_norm_quantize=rms_norm.rms_norm_quantize,
        rms_norm_backward_from_codes=rms_norm.rms_norm_backward_from_codes,
    )


@cache
def _triton() -> Fp8Kernels:
    import kernels.quantize.triton as rows
    import kernels.quantize.triton_blocks as blocks
    import kernels.quantize.triton_columns as columns
    import kernels.quantize.triton_e5m6 as e5m6
    import kernels.rms_norm.any_width as rms_norm
    import kernels.swiglu.triton_fp8 as swiglu
    from kernels.gemm_fp8.tuned import TunedGemm
    from kernels.grouped_gemm.tuned import TunedGroupedGemm

    gemm, grouped = TunedGemm(), TunedGroupedGemm()
    return Fp8Kernels(
        quantize_1x128=rows.quantize_1x128,
        quantize_columns=columns.quantize_columns,
        requantize_columns=columns.requantize_columns,
        quantize_128x128=blocks.quantize_128x128,
        transpose_blocks=blocks.transpose_blocks,
        pack_e5m6=e5m6.pack_e5m6,
        unpack_e5m6=e5m6.unpack_e5m6,
        gemm_fp8=gemm.gemm_fp8,
        gemm_fp8_columns=gemm.gemm_fp8_columns,
        grouped_rows_fp8=grouped.grouped_rows_fp8,
        grouped_weight_fp8=grouped.grouped_weight_fp8,
        swiglu_quantize=swiglu.swiglu_quantize,
        swiglu_backward_from_codes=swiglu.swiglu_backward_from_codes,
        rms_norm_quantize=rms_norm.rms_norm_quantize,
        rms_norm_backward_from_codes=rms_norm.rms_norm_backward_from_codes,
    )


@cache
def _deep_gemm() -> Fp8Kernels:
    from kernels.gemm_fp8.deep_gemm import DeepGemm
    from kernels.grouped_gemm.deep_gemm import DeepGemmGrouped

    own = _triton()
    gemm = DeepGemm(own.gemm_fp8, own.gemm_fp8_columns)
    grouped = DeepGemmGrouped(own.grouped_rows_fp8, own.grouped_weight_fp8)
    return replace(
        own,
        gemm_fp8=gemm.gemm_fp8,
        gemm_fp8_columns=gemm.gemm_fp8_columns,
        grouped_rows_fp8=grouped.grouped_rows_fp8,
        grouped_weight_fp8=grouped.grouped_weight_fp8,
    )
