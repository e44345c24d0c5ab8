"""Which implementation of a step runs is an argument: the reference in plain PyTorch, or Triton's."""

from typing import Protocol, assert_never

from torch import Tensor

import kernels.adamw.reference
from kernels.adamw.coefficients import Coefficients
from kernels.select import Implementation


class AdamwStep(Protocol):
    """`kernels.adamw.reference.adamw_bf16_moments` or its like."""

    def __call__(
        self, weights: Tensor, gradients: Tensor, means: Tensor, squares: Tensor, coefficients: Coefficients
    ) -> None:
        """One step, in place."""


def adamw_step(implementation: Implementation) -> AdamwStep:
    """That of one implementation; imports Triton only where asked for."""
    match implementation:
        case "reference":
            return kernels.adamw.reference.adamw_bf16_moments
        case "triton":
            import kernels.adamw.triton as compiled

            return compiled.adamw_bf16_moments
        case _:
            assert_never(implementation)
