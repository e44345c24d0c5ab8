"""Applies the SwiGLU gate to hidden values, in the rows' type or to FP8, and computes gradients.

`implementation`: None selects the default for the operands' device. Shape legend: as in kernels/swiglu/reference.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernels.implementation import Implementation, is_reference

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.quantize.layout import Quantized


def swiglu(
    gate: Tensor,
    up: Tensor,
    *,
    implementation: Implementation | None = None,
) -> Tensor:
    """Computes silu(gate) * up, as `kernels.swiglu.reference.swiglu` does."""
    if is_reference(implementation, gate.device):
        from kernels.swiglu import reference

        return reference.swiglu(gate, up)
    from kernels.swiglu import triton

    return triton.swiglu(gate, up)


def swiglu_backward(
    grad_AM: Tensor,
    hidden_AH: Tensor,
    *,
    implementation: Implementation | None = None,
) -> Tensor:
    """Computes the gradient of gate and up side by side, AH, as `reference.swiglu_backward` does."""
    if is_reference(implementation, grad_AM.device):
        from kernels.swiglu import reference

        return reference.swiglu_backward(grad_AM, hidden_AH)
    from kernels.swiglu import triton

    return triton.swiglu_backward(grad_AM, hidden_AH)


def swiglu_quantize(
    hidden_AH: Tensor,
    weights_A: Tensor | None,
    *,
    power_of_two: bool,
    implementation: Implementation | None = None,
) -> tuple[Quantized, Quantized]:
    """Applies the gate and the weights with a result in FP8, and quantizes the hidden values to FP8.

    See `kernels.swiglu.reference_fp8.swiglu_quantize`.
    """
    if is_reference(implementation, hidden_AH.device):
        from kernels.swiglu import reference_fp8

        return reference_fp8.swiglu_quantize(hidden_AH, weights_A, power_of_two=power_of_two)
    from kernels.swiglu import triton_fp8

    return triton_fp8.swiglu_quantize(hidden_AH, weights_A, power_of_two=power_of_two)


def swiglu_backward_from_codes(
    grad_AM: Tensor,
    hidden: Quantized,
    weights_A: Tensor | None,
    *,
    implementation: Implementation | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Computes grad_hidden_AH, gated_AM and grad_weights_A from hidden values in FP8.

    See `kernels.swiglu.reference_fp8.swiglu_backward_from_codes`.
    """
    if is_reference(implementation, grad_AM.device):
        from kernels.swiglu import reference_fp8

        return reference_fp8.swiglu_backward_from_codes(grad_AM, hidden, weights_A)
    from kernels.swiglu import triton_fp8

    return triton_fp8.swiglu_backward_from_codes(grad_AM, hidden, weights_A)
