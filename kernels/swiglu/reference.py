"""SwiGLU's gate and its backward, in plain PyTorch (arXiv:2002.05202)."""

# Shape legend: ... leading dims, A rows, M intermediate size, H = 2 M.

import torch
from torch import Tensor
from torch.nn import functional

from kernels.operands import check_operand
from kernels.quantize.layout import Quantized, check_quantized


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Computes silu(gate) * up, [..., M]; raises ValueError unless shapes, types and devices match."""
    check_halves("swiglu", gate, up)
    return functional.silu(gate).mul_(up)


def swiglu_backward(grad_AM: Tensor, hidden_AH: Tensor) -> Tensor:
    """Computes the gradient of `swiglu` in gate and up, side by side, AH, from gate and up side by side."""
    check_backward("swiglu_backward", grad_AM, hidden_AH)
    gate_AM, up_AM = hidden_AH.chunk(2, 1)
    grad_AH = torch.empty_like(hidden_AH)
    gated_backward(grad_AM, functional.silu(gate_AM), gate_AM, up_AM, grad_AH)
    return grad_AH


def gated_backward(grad_AM: Tensor, silu_AM: Tensor, gate_AM: Tensor, up_AM: Tensor, out_AH: Tensor) -> None:
    """Computes `swiglu_backward` from a known silu(gate), and writes it to out_AH."""
    width = grad_AM.shape[1]
    torch.ops.aten.silu_backward.grad_input(grad_AM * up_AM, gate_AM, grad_input=out_AH[:, :width])
    torch.mul(silu_AM, grad_AM, out=out_AH[:, width:])


def check_width(subject: str, num_columns: int, width: int | None = None) -> int:
    """Returns the intermediate size M of gate and up together, H; raises ValueError unless H = 2 M."""
    expected = num_columns // 2 if width is None else width
    if num_columns != 2 * expected:
        rule = "an even number of columns" if width is None else f"twice the gradient's {width} columns"
        raise ValueError(f"{subject} must have {rule}, got {num_columns}; nearest: {2 * expected}")
    return expected


def check_halves(subject: str, gate: Tensor, up: Tensor) -> None:
    """Raises ValueError unless shapes, types and devices of gate and up match."""
    check_operand(f"{subject}: up", up, tuple(gate.shape), gate.device, gate.dtype)


def check_backward(subject: str, grad_AM: Tensor, hidden_AH: Tensor) -> None:
    """Raises ValueError unless hidden values match the gradient."""
    size, width = grad_AM.shape
    check_width(f"{subject}: hidden_AH", hidden_AH.shape[1], width)
    check_operand(f"{subject}: hidden_AH", hidden_AH, (size, 2 * width), grad_AM.device)


def check_weights(subject: str, weights_A: Tensor | None, rows: Tensor) -> None:
    """Raises ValueError unless there is one weight for each row."""
    if weights_A is not None:
        check_operand(f"{subject}: weights_A", weights_A, (rows.shape[0],), rows.device)


def check_backward_from_codes(subject: str, grad_AM: Tensor, hidden: Quantized, weights_A: Tensor | None) -> None:
    """Raises ValueError unless hidden values in FP8 and weights match the gradient."""
    size, width = grad_AM.shape
    check_width(f"{subject}: hidden", hidden.codes.shape[1], width)
    check_operand(f"{subject}: codes", hidden.codes, (size, 2 * width), grad_AM.device)
    check_quantized(subject, *hidden)
    check_weights(subject, weights_A, grad_AM)
