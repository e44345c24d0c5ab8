"""Normalizes rows by their root mean square, in the rows' type or to FP8, and computes gradients.

`implementation`: None selects the default for the operands' device. Triton's kernels hold whole rows: plain PyTorch
runs instead if a row does not fit a program or is not contiguous. Shape legend: as in kernels/rms_norm/reference.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernels.implementation import Implementation, is_reference

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.quantize.layout import Quantized

LARGEST_COLUMNS = 2**13  # above this, the sums for the weight do not fit a program's registers


def rms_norm(
    x: Tensor,
    weight_D: Tensor,
    eps: float,
    *,
    implementation: Implementation | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalizes x and returns the inverse root mean squares too, as `reference.rms_norm` does."""
    if _is_reference(implementation, x):
        from kernels.rms_norm import reference

        return reference.rms_norm(x, weight_D, eps)
    from kernels.rms_norm import triton

    return triton.rms_norm(x, weight_D, eps)


def normalize_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    weight_D: Tensor,
    *,
    implementation: Implementation | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes gradients of x and of the weight, as `kernels.rms_norm.reference.normalize_backward` does."""
    if _is_reference(implementation, grad, x):
        from kernels.rms_norm import reference

        return reference.normalize_backward(grad, x, scale, weight_D)
    from kernels.rms_norm import triton

    return triton.normalize_backward(grad, x, scale, weight_D)


def rms_norm_quantize(
    x_AD: Tensor,
    weight_D: Tensor,
    eps: float,
    *,
    power_of_two: bool,
    implementation: Implementation | None = None,
) -> tuple[Quantized, Tensor]:
    """Normalizes rows, quantizes them to FP8, and returns the inverse root mean squares too, [A, 1].

    See `kernels.rms_norm.reference_fp8.rms_norm_quantize`.
    """
    if _is_reference(implementation, x_AD):
        from kernels.rms_norm import reference_fp8

        return reference_fp8.rms_norm_quantize(x_AD, weight_D, eps, power_of_two=power_of_two)
    from kernels.rms_norm import triton_fp8

    return triton_fp8.rms_norm_quantize(x_AD, weight_D, eps, power_of_two=power_of_two)


def rms_norm_backward_from_codes(
    grad_AD: Tensor,
    normal: Quantized,
    inverse_A1: Tensor,
    weight_D: Tensor,
    *,
    implementation: Implementation | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes gradients of x and of the weight from the norm in FP8.

    See `kernels.rms_norm.reference_fp8.rms_norm_backward_from_codes`.
    """
    if _is_reference(implementation, grad_AD):
        from kernels.rms_norm import reference_fp8

        return reference_fp8.rms_norm_backward_from_codes(grad_AD, normal, inverse_A1, weight_D)
    from kernels.rms_norm import triton_fp8

    return triton_fp8.rms_norm_backward_from_codes(grad_AD, normal, inverse_A1, weight_D)


def _is_reference(implementation: Implementation | None, *matrices: Tensor) -> bool:
    return is_reference(implementation, matrices[0].device) or not all(map(_fits_program, matrices))


def _fits_program(rows: Tensor) -> bool:
    return rows.shape[-1] <= LARGEST_COLUMNS and (rows.stride(-1) == 1 or rows.shape[-1] == 1)
