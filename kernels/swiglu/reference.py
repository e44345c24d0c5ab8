"""SwiGLU's gate and its backward, in plain PyTorch (arXiv:2002.05202).

Shape legend: ... leading dims, A rows, M intermediate size, H = 2 M.
"""

import torch
from torch import Tensor
from torch.nn import functional

from kernels.swiglu.shapes import check_backward, check_halves


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, [..., M].

    Raises:
        ValueError: gate and up differ in shape, type or device.
    """
    check_halves("swiglu", gate, up)
    return functional.silu(gate).mul_(up)


def swiglu_backward(grad_AM: Tensor, hidden_AH: Tensor) -> Tensor:
    """Gradient of `swiglu` in gate and up, which lie side by side: AH.

    Args:
        grad_AM: of the output.
        hidden_AH: gate, then up.

    Raises:
        ValueError: H is not twice the gradient's columns, or rows or devices differ.
    """
    check_backward("swiglu_backward", grad_AM, hidden_AH)
    gate_AM, up_AM = hidden_AH.chunk(2, 1)
    grad_AH = torch.empty_like(hidden_AH)
    gated_backward(grad_AM, functional.silu(gate_AM), gate_AM, up_AM, grad_AH)
    return grad_AH


def gated_backward(grad_AM: Tensor, silu_AM: Tensor, gate_AM: Tensor, up_AM: Tensor, out_AH: Tensor) -> None:
    """`swiglu_backward` where silu(gate) is known, written to out_AH."""
    width = grad_AM.shape[1]
    torch.ops.aten.silu_backward.grad_input(grad_AM * up_AM, gate_AM, grad_input=out_AH[:, :width])
    torch.mul(silu_AM, grad_AM, out=out_AH[:, width:])
