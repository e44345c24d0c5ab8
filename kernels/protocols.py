"""What a kernel takes and gives, whichever implementation it is of.

Shape legend: as in the references named.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from kernels.cross_entropy.reference import CrossEntropy
from kernels.quantize.layout import Quantized


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


class GroupedRows(Protocol):
    """`kernels.grouped_gemm.reference.grouped_rows` or its like."""

    def __call__(self, rows_AK: Tensor, weight_ENK: Tensor, counts: Sequence[int]) -> Tensor:
        """rows_AN."""


class GroupedWeight(Protocol):
    """`kernels.grouped_gemm.reference.grouped_weight` or its like."""

    def __call__(self, grad_AN: Tensor, rows_AK: Tensor, counts: Sequence[int]) -> Tensor:
        """ENK."""


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
