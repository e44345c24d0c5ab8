"""Defines Muon, whose updates of matrices are near their orthogonal factors. No torch at the top."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from base.ranges import PositiveFloat, ShareBelowOne
from train.optim.learning_rate import OptimConfig
from train.optim.registry import OPTIMIZERS, MatrixRule, OptimizerSpec

if TYPE_CHECKING:
    from torch import Tensor

_STEPS = 5
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of Keller Jordan's quintic: five steps bring singular values from 0.01 to 1 to between 0.68 and 1.14."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MuonConfig(OptimConfig):
    """The configuration of Muon (arXiv:2502.16982, section 2.2). `beta1`, `beta2` and `eps` are AdamW's.

    `update_rms` is the root mean square of an update before the learning rate; 0.2 is about that of AdamW.
    """

    momentum: ShareBelowOne
    update_rms: PositiveFloat


def orthogonalize(matrices_NRC: Tensor) -> Tensor:
    """Returns about U V^T of each matrix U S V^T in a stack, N x R x C; zeros stay zeros."""
    import torch

    # The Gram matrix is that of the shorter side.
    is_tall = matrices_NRC.shape[-2] > matrices_NRC.shape[-1]
    near = matrices_NRC.mT if is_tall else matrices_NRC
    # The Frobenius norm bounds the largest singular value.
    near = near / (torch.linalg.vector_norm(near, dim=(-2, -1), keepdim=True) + 1e-7)
    first, second, third = _COEFFICIENTS
    for _ in range(_STEPS):
        gram = near @ near.mT
        near = torch.baddbmm(near, torch.baddbmm(gram, gram, gram, beta=second, alpha=third), near, beta=first)
    return near.mT if is_tall else near


def muon_update(
    weights_NRC: Tensor, gradients_NRC: Tensor, buffers: Mapping[str, Tensor], config: MuonConfig
) -> Tensor:
    """Returns Muon's move of each matrix (arXiv:2502.16982, section 2.2), with Nesterov's momentum.

    The products have the type of the weights.
    """
    import torch

    momentum_NRC = buffers["momentum"]
    ahead = torch.add(gradients_NRC, momentum_NRC, alpha=config.momentum)
    momentum_NRC.copy_(ahead)
    ahead.mul_(config.momentum).add_(gradients_NRC)
    rows, columns = weights_NRC.shape[-2:]
    scale: float = config.update_rms * max(rows, columns) ** 0.5
    return orthogonalize(ahead.to(weights_NRC.dtype)).to(gradients_NRC.dtype).mul_(scale)


def newton_schulz_flops(rows: int, columns: int) -> float:
    """Returns the operations of all steps for one matrix: Gram matrix, its square, and a product."""
    short, long = sorted((rows, columns))
    return _STEPS * (4.0 * short**2 * long + 2.0 * short**3)


OPTIMIZERS.register(
    "muon",
    OptimizerSpec(
        summary="Muon for matrices of attention, MLPs and experts, AdamW for embeddings, heads, routers and norms",
        config=MuonConfig,
        matrices=MatrixRule(buffers=("momentum",), update=muon_update, flops=newton_schulz_flops),
        example={"momentum": 0.95, "update_rms": 0.2},
    ),
)
