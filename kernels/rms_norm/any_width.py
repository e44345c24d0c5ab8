"""Triton's norms where a row fits a program and lies in one piece, plain PyTorch's for others.

Shape legend: ... leading dims, A rows, D normalised size.
"""

from torch import Tensor

import kernels.rms_norm.reference as plain
import kernels.rms_norm.reference_fp8 as plain_fp8
import kernels.rms_norm.triton as compiled
import kernels.rms_norm.triton_fp8 as compiled_fp8
from kernels.quantize.layout import Quantized
from kernels.rms_norm.tiling import LARGEST_COLUMNS


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `reference.rms_norm`."""
    run = compiled.rms_norm if _serves(x) else plain.rms_norm
    return run(x, weight_D, eps)


def normalise_backward(grad: Tensor, x: Tensor, scale: Tensor, weight_D: Tensor) -> tuple[Tensor, Tensor]:
    """As `reference.normalise_backward`."""
    run = compiled.normalise_backward if _serves(grad) and _serves(x) else plain.normalise_backward
    return run(grad, x, scale, weight_D)


def rms_norm_quantize(x_AD: Tensor, weight_D: Tensor, eps: float, power_of_two: bool) -> tuple[Quantized, Tensor]:
    """As `reference_fp8.rms_norm_quantize`."""
    run = compiled_fp8.rms_norm_quantize if _serves(x_AD) else plain_fp8.rms_norm_quantize
    return run(x_AD, weight_D, eps, power_of_two)


def rms_norm_backward_from_codes(
    grad_AD: Tensor, normal: Quantized, inverse_A1: Tensor, weight_D: Tensor
) -> tuple[Tensor, Tensor]:
    """As `reference_fp8.rms_norm_backward_from_codes`."""
    run = compiled_fp8.rms_norm_backward_from_codes if _serves(grad_AD) else plain_fp8.rms_norm_backward_from_codes
    return run(grad_AD, normal, inverse_A1, weight_D)


def _serves(rows: Tensor) -> bool:
    return rows.shape[-1] <= LARGEST_COLUMNS and (rows.stride(-1) == 1 or rows.shape[-1] == 1)
