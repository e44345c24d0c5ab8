"""What a step minimises: sums of cross-entropies and balance losses, normalised by counts over the whole job.

Source: arXiv:2412.19437, sections 2.1.2 and 2.2.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels.attention.documents import Documents


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """One micro-batch as the ends of the model see it.

    inputs_BT: per depth k = 0 (main), 1, ... the token embedded at each position (shifted by k).
    targets_BT: per depth the token to predict (shifted by k + 1), -100 where there is none.
    All int64 [B, T]. documents: which tokens see each other; None: each those before it.
    """

    inputs_BT: tuple[Tensor, ...]
    targets_BT: tuple[Tensor, ...]
    documents: Documents | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """Factors that turn a micro-batch's sums into its part of the step's loss.

    cross_entropy: per depth; 1 / (targets of that depth in the global batch) for the main head, with
    MTP's weight over its depth for the others. balance: its weight over the global batch's sequences.
    """

    cross_entropy: tuple[float, ...]
    balance: float


@dataclass(slots=True)
class LossSums:
    """Sums seen by one rank in one step, undivided; added up over ranks they give the step's losses.

    cross_entropy: per depth, nats summed over targets. balance: summed over sequences and layers.
    """

    cross_entropy: list[float]
    balance: float = 0.0
    pending: list[tuple[int, Tensor]] = field(default_factory=list)

    def add_cross_entropy(self, depth: int, total: Tensor) -> None:
        """Notes the summed cross-entropy of one micro-batch at one depth; read on the host only by `settle`."""
        self.pending.append((depth, total.detach()))

    def add_balance(self, total: Tensor) -> None:
        """Notes the summed balance loss of one micro-batch in one layer."""
        self.pending.append((-1, total.detach()))

    def settle(self) -> Tensor:
        """All sums in order (cross-entropy per depth, balance), float64 on the host."""
        for depth, total in self.pending:
            if depth < 0:
                self.balance += float(total)
            else:
                self.cross_entropy[depth] += float(total)
        self.pending.clear()
        return torch.tensor([*self.cross_entropy, self.balance], dtype=torch.float64)
