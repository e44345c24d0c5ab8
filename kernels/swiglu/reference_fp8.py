"""SwiGLU between two FP8 products, with a backward from cached codes, in plain PyTorch."""

# Shape legend: A rows, M intermediate size, H = 2 M, gate and up side by side, R rows processed at a time.

import torch
from torch import Tensor
from torch.nn import functional

from kernels.quantize.layout import Quantized, empty_quantized
from kernels.quantize.reference import CHUNK_NUMBERS, dequantize_1x128, quantize_1x128
from kernels.swiglu.reference import check_backward_from_codes, check_weights, check_width


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
        hidden_RH = hidden_AH[chunk].float()
        gate_RM, up_RM = hidden_RH.split(width, 1)
        gated_RM = functional.silu(gate_RM).mul_(up_RM)
        if weights_A is not None:
            gated_RM.mul_(weights_A[chunk, None].float())
        for whole, part_RD in ((gated, gated_RM), (cached, hidden_RH)):
            whole.codes[chunk], whole.scales[chunk] = quantize_1x128(part_RD, power_of_two=power_of_two)
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
    grad_hidden_AH, gated_AM = grad_AM.new_empty(size, 2 * width), torch.empty_like(grad_AM)
    grad_weights_A = None if weights_A is None else grad_AM.new_zeros(size, dtype=torch.float32)
    chunk_rows = max(1, CHUNK_NUMBERS // max(1, 2 * width))
    for first in range(0, size if width else 0, chunk_rows):
        chunk = slice(first, first + chunk_rows)
        grad_RM, out_RH = grad_AM[chunk].float(), grad_hidden_AH[chunk]
        hidden_RH = dequantize_1x128(Quantized(hidden.codes[chunk], hidden.scales[chunk]), torch.float32)
        gate_RM, up_RM = hidden_RH.split(width, 1)
        silu_RM = functional.silu(gate_RM)
        gated_RM = silu_RM * up_RM
        if weights_A is not None and grad_weights_A is not None:
            weights_R1 = weights_A[chunk, None].float()
            torch.sum(gated_RM * grad_RM, 1, out=grad_weights_A[chunk])
            gated_RM.mul_(weights_R1)
            grad_RM = grad_RM * weights_R1
        gated_AM[chunk] = gated_RM
        out_RH[:, width:] = silu_RM.mul_(grad_RM)
        out_RH[:, :width] = torch.ops.aten.silu_backward(grad_RM * up_RM, gate_RM)
    return grad_hidden_AH, gated_AM, grad_weights_A
