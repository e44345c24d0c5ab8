"""Which implementation of a kernel runs is an argument: the reference in plain PyTorch, or Triton's.

Shape legend: as in kernels/permute/reference.py.
"""

from dataclasses import dataclass
from typing import Literal, assert_never

import torch

import kernels.cross_entropy.reference
import kernels.expert_mlp.batched
import kernels.expert_mlp.grouped
import kernels.expert_mlp.reference
import kernels.grouped_gemm.native
import kernels.grouped_gemm.reference
import kernels.permute.reference
import kernels.quantize.reference
import kernels.rms_norm.reference
import kernels.swiglu.reference
from kernels.protocols import (
    Dequantize,
    DownGradient,
    ExpertBackward,
    ExpertForward,
    GateUpGradient,
    GroupedRows,
    GroupedWeight,
    LinearCrossEntropy,
    Permute,
    Quantize,
    RmsNormBackward,
    RmsNormForward,
    Swiglu,
    SwigluBackward,
    Unpermute,
)

Implementation = Literal["reference", "triton"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertKernels:
    """SwiGLU experts over rows sorted by expert, and their gradients."""

    forward: ExpertForward
    backward: ExpertBackward
    gate_up_gradient: GateUpGradient
    down_gradient: DownGradient


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupedKernels:
    """Products of rows sorted by group with one matrix per group."""

    rows: GroupedRows
    weight: GroupedWeight


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


def grouped_kernels(implementation: Implementation | Literal["native"]) -> GroupedKernels:
    """Grouped products of one implementation; `native` is torch's own, for CUDA and bf16."""
    match implementation:
        case "reference":
            reference = kernels.grouped_gemm.reference
            return GroupedKernels(rows=reference.grouped_rows, weight=reference.grouped_weight)
        case "native":
            native = kernels.grouped_gemm.native
            return GroupedKernels(rows=native.grouped_rows, weight=native.grouped_weight)
        case "triton":
            import kernels.grouped_gemm.triton as compiled

            return GroupedKernels(rows=compiled.grouped_rows, weight=compiled.grouped_weight)
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
