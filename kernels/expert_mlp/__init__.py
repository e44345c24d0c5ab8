"""Runs SwiGLU experts over rows sorted by expert, and computes their gradients, in plain PyTorch."""

from collections.abc import Callable
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor

from kernels.expert_mlp import grouped, reference
from kernels.operation import ChosenFunction

P = ParamSpec("P")
R = TypeVar("R")

ExpertImplementation = Literal["reference", "grouped"]
"""One expert after the other, or torch's grouped products."""


def choose_expert_implementation(
    device: torch.device, dtype: torch.dtype, hidden: int, width: int
) -> ExpertImplementation:
    """Returns `grouped` if torch's grouped product fits, else `reference`."""
    return "grouped" if grouped.supports(device, dtype, hidden, width) else "reference"


def _operation(function: Callable[P, R], sizes_of: Callable[..., tuple[int, int]]) -> ChosenFunction[P, R]:
    """Returns an operation; `sizes_of` gives the hidden and the intermediate size from its operands."""
    modules = {name: f"{__name__}.{name}" for name in ("reference", "grouped")}

    def choose(rows: Tensor, *others: Any) -> ExpertImplementation:
        return choose_expert_implementation(rows.device, rows.dtype, *sizes_of(rows, *others))

    return ChosenFunction(function, modules, choose)


expert_mlp = _operation(reference.expert_mlp, lambda rows, weights, gate_up, down_EDM, *rest: down_EDM.shape[1:])
expert_mlp_backward = _operation(
    reference.expert_mlp_backward, lambda grad, weights, hidden, gate_up, down_EDM, *rest: down_EDM.shape[1:]
)
expert_hidden = _operation(
    reference.expert_hidden, lambda rows_AD, gate_up_EHD, counts: (rows_AD.shape[1], gate_up_EHD.shape[1] // 2)
)
gate_up_gradient = _operation(
    reference.gate_up_gradient, lambda grad_AH, rows_AD, *rest: (rows_AD.shape[1], grad_AH.shape[1] // 2)
)
down_gradient = _operation(
    reference.down_gradient, lambda grad_AD, weights, hidden_AH, *rest: (grad_AD.shape[1], hidden_AH.shape[1] // 2)
)
