"""SwiGLU's gate and its backward, also between two FP8 products, in plain PyTorch (arXiv:2002.05202)."""

# Shape legend: ... leading dims, A rows, M intermediate size, H = 2 M, R rows processed at a time.

import torch
from torch import Tensor
from torch.nn import functional

from kernels.operation import check_operand
from kernels.quantize.layout import Quantized, check_quantized, empty_quantized
from kernels.quantize.reference import CHUNK_NUMBERS, dequantize_1x128, quantize_1x128


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


def swiglu_quantize(hidden_AH: Tensor, weights_A: Tensor | None, *, power_of_two: bool) -> tuple[Quantized, Quantized]:
    """Quantizes silu(gate) * up * weight for the next product, and the hidden values for the backward.

    The operand, AM, is computed in float32 from the given hidden values, not from their codes, and rounded once
    (arXiv:2412.19437, section 3.3.3: SwiGLU's inputs are cached in FP8, its output is computed again in the backward).
    A tile of the hidden values, AH, may hold the last gates and the first ups. `weights_A`: None means 1.
    """
    size, hidden = hidden_AH.shape
    width = check_width("swiglu_quantize: hidden_AH", hidden)
    check_weights("swiglu_quantize", weights_A, hidden_AH)
    gated = empty_quantized(hidden_AH, size, width)
    cached = empty_quantized(hidden_AH, size, hidden)
    chunk_rows = max(1, CHUNK_NUMBERS // max(1, hidden))
    for first in range(0, size if width else 0, chunk_rows):
        chunk = slice(first, first + chunk_rows)
        # A chunk of rows in float32, R H; the operand is rounded once, from here to codes.
        hidden_RH = hidden_AH[chunk].float()
        gate_RM, up_RM = hidden_RH.split(width, 1)
        gated_RM = functional.silu(gate_RM).mul_(up_RM)
        if weights_A is not None:
            gated_RM.mul_(weights_A[chunk, None].float())
        for quantized, part_RD in ((gated, gated_RM), (cached, hidden_RH)):
            quantized.codes[chunk], quantized.scales[chunk] = quantize_1x128(part_RD, power_of_two=power_of_two)
    return gated, cached


def swiglu_backward_from_codes(
    grad_AM: Tensor, hidden: Quantized, weights_A: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Computes the gradients of `silu(gate) * up * weight` from the codes of gate and up, in float32.

    Returns grad_hidden_AH and gated_AM, the result computed again, in the gradient's type; and the gradient of the
    weights, float32 A, or None.
    """
    size, width = grad_AM.shape
    check_backward_from_codes("swiglu_backward_from_codes", grad_AM, hidden, weights_A)
    grad_hidden_AH = grad_AM.new_empty(size, 2 * width)
    gated_AM = torch.empty_like(grad_AM)
    grad_weights_A = None if weights_A is None else grad_AM.new_zeros(size, dtype=torch.float32)
    chunk_rows = max(1, CHUNK_NUMBERS // max(1, 2 * width))
    for first in range(0, size if width else 0, chunk_rows):
        chunk = slice(first, first + chunk_rows)
        grad_RM = grad_AM[chunk].float()
        out_RH = grad_hidden_AH[chunk]
        hidden_RH = dequantize_1x128(Quantized(hidden.codes[chunk], hidden.scales[chunk]), torch.float32)
        gate_RM, up_RM = hidden_RH.split(width, 1)
        # The product again, R M, from the codes of gate and up.
        silu_RM = functional.silu(gate_RM)
        gated_RM = silu_RM * up_RM
        if weights_A is not None and grad_weights_A is not None:
            weights_R1 = weights_A[chunk, None].float()
            torch.sum(gated_RM * grad_RM, 1, out=grad_weights_A[chunk])
            gated_RM.mul_(weights_R1)
            grad_RM = grad_RM * weights_R1
        gated_AM[chunk] = gated_RM
        # Gradients of up, then of gate, side by side as H.
        out_RH[:, width:] = silu_RM.mul_(grad_RM)
        out_RH[:, :width] = torch.ops.aten.silu_backward(grad_RM * up_RM, gate_RM)
    return grad_hidden_AH, gated_AM, grad_weights_A
