"""Which implementation of a kernel runs is an argument: the reference in plain PyTorch, or Triton's.

Shape legend: as in kernels/permute/reference.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, assert_never

import torch
from torch import Tensor

import kernels.cross_entropy.reference
import kernels.expert_mlp.batched
import kernels.expert_mlp.grouped
import kernels.expert_mlp.reference
import kernels.grouped_gemm.native
import kernels.permute.reference
import kernels.quantize.reference
import kernels.rms_norm.reference
import kernels.swiglu.reference
from kernels.cross_entropy.reference import CrossEntropy
from kernels.quantize.layout import Quantized

Implementation = Literal["reference", "triton"]


class Permute(Protocol):
    """`kernels.permute.reference.permute` or its like."""

    def __call__(self, rows_ND: Tensor, source_A: Tensor, out_AD: Tensor | None = None) -> Tensor:
        """out_AD: rows gathered by index."""


class Unpermute(Protocol):
    """`kernels.permute.reference.unpermute` or its like."""

    def __call__(self, rows_AD: Tensor, places_NK: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """out_ND: per token, the sum of its rows."""


class Quantize(Protocol):
    """`kernels.quantize.reference.quantize_1x128` or its like."""

    def __call__(self, rows_ND: Tensor, power_of_two: bool, min_amax: float = 1e-4) -> Quantized:
        """Codes and scales of rows."""


class Dequantize(Protocol):
    """`kernels.quantize.reference.dequantize_1x128` or its like."""

    def __call__(self, quantized: Quantized, dtype: torch.dtype) -> Tensor:
        """rows_ND from codes and scales."""


class ExpertForward(Protocol):
    """`kernels.expert_mlp.reference.expert_mlp` or its like."""

    def __call__(
        self,
        rows_ND: Tensor,
        weights_A: Tensor,
        gate_up_EHD: Tensor,
        down_EDM: Tensor,
        counts: Sequence[int],
        tokens_A: Tensor | None = None,
        gated_AM: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """out_AD, hidden_AH."""


class ExpertBackward(Protocol):
    """`kernels.expert_mlp.reference.expert_mlp_backward` or its like."""

    def __call__(
        self,
        grad_ND: Tensor,
        weights_A: Tensor,
        hidden_AH: Tensor,
        gate_up_EHD: Tensor,
        down_EDM: Tensor,
        counts: Sequence[int],
        tokens_A: Tensor | None = None,
        *,
        rows_ND: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Gradients of rows, weights, and of the experts or of hidden values."""


class GateUpGradient(Protocol):
    """`kernels.expert_mlp.reference.gate_up_gradient` or its like."""

    def __call__(self, grad_hidden_AH: Tensor, rows_AD: Tensor, counts: Sequence[int]) -> Tensor:
        """EHD."""


class DownGradient(Protocol):
    """`kernels.expert_mlp.reference.down_gradient` or its like."""

    def __call__(
        self,
        grad_AD: Tensor,
        weights_A: Tensor,
        hidden_AH: Tensor,
        counts: Sequence[int],
        gated_AM: Tensor | None = None,
    ) -> Tensor:
        """EDM."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertKernels:
    """SwiGLU experts over rows sorted by expert, and their gradients."""

    forward: ExpertForward
    backward: ExpertBackward
    gate_up_gradient: GateUpGradient
    down_gradient: DownGradient


class RmsNormForward(Protocol):
    """`kernels.rms_norm.reference.rms_norm` or its like."""

    def __call__(self, x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Normal, and the inverse root mean squares."""


class RmsNormBackward(Protocol):
    """`kernels.rms_norm.reference.normalise_backward` or its like."""

    def __call__(self, grad: Tensor, x: Tensor, scale: Tensor, weight_D: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of x and of the weight."""


class Swiglu(Protocol):
    """`kernels.swiglu.reference.swiglu` or its like."""

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) * up."""


class SwigluBackward(Protocol):
    """`kernels.swiglu.reference.swiglu_backward` or its like."""

    def __call__(self, grad_AM: Tensor, hidden_AH: Tensor) -> Tensor:
        """Gradient of gate and up side by side."""


class LinearCrossEntropy(Protocol):
    """`kernels.cross_entropy.reference.linear_cross_entropy` or its like."""

    def __call__(
        self, rows_ND: Tensor, head_VD: Tensor, targets_N: Tensor, *, wants_rows: bool, wants_head: bool
    ) -> CrossEntropy:
        """The loss of a linear head, and its gradients."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FusedKernels:
    """Norms, gates and losses: what a pass over memory does between products."""

    rms_norm: RmsNormForward
    normalise_backward: RmsNormBackward
    swiglu: Swiglu
    swiglu_backward: SwigluBackward
    linear_cross_entropy: LinearCrossEntropy


@dataclass(frozen=True, kw_only=True, slots=True)
class PermuteKernels:
    """Reordering of rows, and the way back with a sum per token."""

    permute: Permute
    unpermute: Unpermute


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizeKernels:
    """Rows to FP8 with a scale per row and 128 columns, and back."""

    quantize_1x128: Quantize
    dequantize_1x128: Dequantize


def implementation_for(device: torch.device) -> Implementation:
    """The implementation that suits a device: Triton's on CUDA, the reference elsewhere."""
    return "triton" if device.type == "cuda" else "reference"


def permute_kernels(implementation: Implementation) -> PermuteKernels:
    """`permute` and `unpermute` of one implementation; imports Triton only where asked for."""
    match implementation:
        case "reference":
            reference = kernels.permute.reference
            return PermuteKernels(permute=reference.permute, unpermute=reference.unpermute)
        case "triton":
            import kernels.permute.triton as compiled

            return PermuteKernels(permute=compiled.permute, unpermute=compiled.unpermute)
        case _:
            assert_never(implementation)


def quantize_kernels(implementation: Implementation) -> QuantizeKernels:
    """`quantize_1x128` and `dequantize_1x128` of one implementation; imports Triton only where asked for."""
    match implementation:
        case "reference":
            reference = kernels.quantize.reference
            return QuantizeKernels(quantize_1x128=reference.quantize_1x128, dequantize_1x128=reference.dequantize_1x128)
        case "triton":
            import kernels.quantize.triton as compiled

            return QuantizeKernels(quantize_1x128=compiled.quantize_1x128, dequantize_1x128=compiled.dequantize_1x128)
        case _:
            assert_never(implementation)


def fused_kernels(implementation: Implementation) -> FusedKernels:
    """Those of one implementation; imports Triton only where asked for."""
    match implementation:
        case "reference":
            norm, gate, loss = kernels.rms_norm.reference, kernels.swiglu.reference, kernels.cross_entropy.reference
            return FusedKernels(
                rms_norm=norm.rms_norm,
                normalise_backward=norm.normalise_backward,
                swiglu=gate.swiglu,
                swiglu_backward=gate.swiglu_backward,
                linear_cross_entropy=loss.linear_cross_entropy,
            )
        case "triton":
            import kernels.cross_entropy.triton as compiled_loss
            import kernels.rms_norm.any_width as compiled_norm
            import kernels.swiglu.triton as compiled_gate

            return FusedKernels(
                rms_norm=compiled_norm.rms_norm,
                normalise_backward=compiled_norm.normalise_backward,
                swiglu=compiled_gate.swiglu,
                swiglu_backward=compiled_gate.swiglu_backward,
                linear_cross_entropy=compiled_loss.linear_cross_entropy,
            )
        case _:
            assert_never(implementation)


ExpertImplementation = Literal["reference", "batched", "grouped"]


def expert_implementation_for(
    device: torch.device, dtype: torch.dtype, hidden: int, width: int
) -> ExpertImplementation:
    """torch's grouped products where they serve; on CPU batched ones for 16 bits; else one expert after the other."""
    if kernels.grouped_gemm.native.serves(device, dtype, hidden, width):
        return "grouped"
    return "batched" if device.type == "cpu" and dtype in (torch.bfloat16, torch.float16) else "reference"


def expert_kernels(implementation: ExpertImplementation) -> ExpertKernels:
    """The experts' products of one implementation."""
    module = {
        "reference": kernels.expert_mlp.reference,
        "batched": kernels.expert_mlp.batched,
        "grouped": kernels.expert_mlp.grouped,
    }[implementation]
    return ExpertKernels(
        forward=module.expert_mlp,
        backward=module.expert_mlp_backward,
        gate_up_gradient=module.gate_up_gradient,
        down_gradient=module.down_gradient,
    )
