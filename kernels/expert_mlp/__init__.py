"""Runs SwiGLU experts over rows sorted by expert, and computes their gradients.

`implementation`: None selects the default for the operands. Shape legend: as in kernels/expert_mlp/reference.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, assert_never

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

    import torch
    from torch import Tensor

ExpertImplementation = Literal["reference", "batched", "grouped"]
"""In plain PyTorch: one expert after the other, many experts in one batched product, or torch's grouped products."""


def choose_expert_implementation(
    device: torch.device, dtype: torch.dtype, hidden: int, width: int
) -> ExpertImplementation:
    """Returns `grouped` if torch's grouped product fits, else `batched` (16 bits on CPU) or `reference`."""
    import torch

    from kernels.grouped_gemm import native

    if native.supports(device, dtype, hidden, width):
        return "grouped"
    return "batched" if device.type == "cpu" and dtype in (torch.bfloat16, torch.float16) else "reference"


def expert_mlp(
    rows_ND: Tensor,
    weights_A: Tensor,
    gate_up_EHD: Tensor,
    down_EDM: Tensor,
    counts: Sequence[int],
    tokens_A: Tensor | None = None,
    gated_AM: Tensor | None = None,
    *,
    implementation: ExpertImplementation | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns out_AD and hidden_AH, as `kernels.expert_mlp.reference.expert_mlp` does."""
    module = _module(implementation, rows_ND, down_EDM.shape[2])
    made: tuple[Tensor, Tensor] = module.expert_mlp(
        rows_ND, weights_A, gate_up_EHD, down_EDM, counts, tokens_A, gated_AM
    )
    return made


def expert_hidden(
    rows_AD: Tensor,
    gate_up_EHD: Tensor,
    counts: Sequence[int],
    *,
    implementation: ExpertImplementation | None = None,
) -> Tensor:
    """Returns hidden_AH alone, bit for bit that of `expert_mlp`, for rows in the experts' order."""
    module = _module(implementation, rows_AD, gate_up_EHD.shape[1] // 2)
    made: Tensor = module.expert_hidden(rows_AD, gate_up_EHD, counts)
    return made


def expert_mlp_backward(  # noqa: PLR0913
    grad_ND: Tensor,
    weights_A: Tensor,
    hidden_AH: Tensor,
    gate_up_EHD: Tensor,
    down_EDM: Tensor,
    counts: Sequence[int],
    tokens_A: Tensor | None = None,
    *,
    rows_ND: Tensor | None = None,
    implementation: ExpertImplementation | None = None,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Computes gradients of the rows and routing weights, and of the experts or of the hidden values.

    See `kernels.expert_mlp.reference.expert_mlp_backward`.
    """
    module = _module(implementation, grad_ND, down_EDM.shape[2])
    made: tuple[Tensor, Tensor, tuple[Tensor, ...]] = module.expert_mlp_backward(
        grad_ND, weights_A, hidden_AH, gate_up_EHD, down_EDM, counts, tokens_A, rows_ND=rows_ND
    )
    return made


def gate_up_gradient(
    grad_hidden_AH: Tensor,
    rows_AD: Tensor,
    counts: Sequence[int],
    *,
    implementation: ExpertImplementation | None = None,
) -> Tensor:
    """Computes the gradient of gate and up, EHD, as `kernels.expert_mlp.reference.gate_up_gradient` does."""
    module = _module(implementation, rows_AD, grad_hidden_AH.shape[1] // 2)
    made: Tensor = module.gate_up_gradient(grad_hidden_AH, rows_AD, counts)
    return made


def down_gradient(
    grad_AD: Tensor,
    weights_A: Tensor,
    hidden_AH: Tensor,
    counts: Sequence[int],
    gated_AM: Tensor | None = None,
    *,
    implementation: ExpertImplementation | None = None,
) -> Tensor:
    """Computes the gradient of down, EDM, as `kernels.expert_mlp.reference.down_gradient` does."""
    module = _module(implementation, grad_AD, hidden_AH.shape[1] // 2)
    made: Tensor = module.down_gradient(grad_AD, weights_A, hidden_AH, counts, gated_AM)
    return made


def _module(implementation: ExpertImplementation | None, rows_ND: Tensor, width: int) -> ModuleType:
    implementation = implementation or choose_expert_implementation(
        rows_ND.device, rows_ND.dtype, rows_ND.shape[1], width
    )
    match implementation:
        case "reference":
            from kernels.expert_mlp import reference

            return reference
        case "batched":
            from kernels.expert_mlp import batched

            return batched
        case "grouped":
            from kernels.expert_mlp import grouped

            return grouped
        case _:
            assert_never(implementation)
