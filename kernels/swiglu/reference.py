"""SwiGLU's gate and its backward, in plain PyTorch (arXiv:2002.05202).

Shape legend: ... leading dims, M intermediate size.
"""

import torch
from torch import Tensor
from torch.nn import functional


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, [..., M]."""
    return functional.silu(gate).mul_(up)


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `swiglu` in gate and up, [..., M] each."""
    grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
    return grad_gate, functional.silu(gate).mul_(grad)
