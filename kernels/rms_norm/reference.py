"""Root-mean-square normalization, also to FP8, and its backward, in plain PyTorch."""

# Shape legend: ... leading dims, A rows, D normalized size, R rows processed at a time.

import torch
from torch import Tensor

from kernels.operation import check_operand
from kernels.quantize.layout import Quantized, check_quantized, empty_quantized
from kernels.quantize.reference import CHUNK_NUMBERS, dequantize_1x128, quantize_1x128

LARGEST_COLUMNS = 2**13  # above this, the sums for the weight do not fit a program's registers


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """Computes 1 / sqrt(mean(x^2) + eps) over the last dim, [..., 1], in float32 or wider."""
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    length: Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def normalize(x: Tensor, scale: Tensor, weight_D: Tensor) -> Tensor:
    """Computes x * its `inverse_rms`, casts it to x's type, and then multiplies by the weight."""
    return (x * scale).to(x.dtype).mul_(weight_D)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns `normalize` of x, and the `inverse_rms`; raises ValueError for a weight of another size."""
    check_weight("rms_norm", weight_D, x)
    scale = inverse_rms(x, eps)
    return normalize(x, scale, weight_D), scale


def normalize_backward(grad: Tensor, x: Tensor, scale: Tensor, weight_D: Tensor) -> tuple[Tensor, Tensor]:
    """Computes the gradients of `normalize` in x, [..., D], and the weight, [D], in the type of `scale`."""
    check_backward("normalize_backward", grad, x, scale, weight_D)
    wide = x.to(scale.dtype)
    wide_grad = grad.to(scale.dtype)
    weight = weight_D.to(scale.dtype)
    # torch's fused backward of layer norm, with a mean of 0; the term that it subtracts for the mean is added back.
    grad_x, grad_weight_D, _ = torch.ops.aten.native_layer_norm_backward(
        wide_grad, wide, [x.shape[-1]], torch.zeros_like(scale), scale, weight, None, [True, True, False]
    )
    grad_x.addcmul_(scale, (wide_grad @ weight).unsqueeze_(-1), value=1 / x.shape[-1])
    return grad_x.to(x.dtype), grad_weight_D.to(weight_D.dtype)


def check_weight(subject: str, weight_D: Tensor, x: Tensor) -> None:
    """Raises ValueError unless the weight has one number for each column, on the device."""
    check_operand(f"{subject}: weight_D", weight_D, (x.shape[-1],), x.device)


def check_backward(subject: str, grad: Tensor, x: Tensor, scale: Tensor, weight_D: Tensor) -> None:
    """Raises ValueError unless the operands of a backward belong to one forward."""
    check_operand(f"{subject}: grad", grad, tuple(x.shape), x.device)
    check_operand(f"{subject}: scale", scale, (*x.shape[:-1], 1), x.device)
    check_weight(subject, weight_D, x)


def check_backward_from_codes(
    subject: str, grad_AD: Tensor, normal: Quantized, inverse_A1: Tensor, weight_D: Tensor
) -> None:
    """Raises ValueError unless the operands of a backward from codes belong to one forward."""
    size, num_columns = grad_AD.shape
    check_operand(f"{subject}: codes", normal.codes, (size, num_columns), grad_AD.device)
    check_quantized(subject, *normal)
    check_operand(f"{subject}: inverse_A1", inverse_A1, (size, 1), grad_AD.device)
    check_weight(subject, weight_D, grad_AD)


def rms_norm_quantize(x_AD: Tensor, weight_D: Tensor, eps: float, *, power_of_two: bool) -> tuple[Quantized, Tensor]:
    """Computes x / sqrt(mean(x^2) + eps) * weight, and rounds it once to FP8 (arXiv:2412.19437, 3.3.2).

    Returns codes float8_e4m3fn AD with a scale per row and 128 columns, and 1 / sqrt(mean(x^2) + eps), float32 [A, 1].
    """
    check_weight("rms_norm_quantize", weight_D, x_AD)
    size, num_columns = x_AD.shape
    normal = empty_quantized(x_AD, size, num_columns)
    inverse_A1 = x_AD.new_empty(size, 1, dtype=torch.float32)
    weight_D = weight_D.float()
    chunk_rows = max(1, CHUNK_NUMBERS // max(1, num_columns))
    for first in range(0, size, chunk_rows):
        chunk = slice(first, first + chunk_rows)
        wide_RD = x_AD[chunk].float()
        inverse_A1[chunk] = inverse_rms(wide_RD, eps)
        normal_RD = (wide_RD * inverse_A1[chunk]).mul_(weight_D)
        normal.codes[chunk], normal.scales[chunk] = quantize_1x128(normal_RD, power_of_two=power_of_two)
    return normal, inverse_A1


def rms_norm_backward_from_codes(
    grad_AD: Tensor, normal: Quantized, inverse_A1: Tensor, weight_D: Tensor
) -> tuple[Tensor, Tensor]:
    """Computes the gradients of the normalization in x and in the weight from the codes of its result.

    With x-hat = result / weight, or 0 if the weight is 0, the gradient of x, in the type of `grad`, is
    `inverse * (grad * weight - x-hat * mean(grad * result))`, and that of the weight, float32, is the sum over rows of
    `grad * x-hat`.
    """
    check_backward_from_codes("rms_norm_backward_from_codes", grad_AD, normal, inverse_A1, weight_D)
    size, num_columns = grad_AD.shape
    grad_x_AD = torch.empty_like(grad_AD)
    grad_weight_D = grad_AD.new_zeros(num_columns, dtype=torch.float32)
    weight_D = weight_D.float()
    divisor_D = weight_D.masked_fill(weight_D == 0, torch.inf)  # dividing by infinity gives 0, and NaN stays NaN
    chunk_rows = max(1, CHUNK_NUMBERS // max(1, num_columns))
    for first in range(0, size if num_columns else 0, chunk_rows):
        chunk = slice(first, first + chunk_rows)
        grad_RD = grad_AD[chunk].float()
        normal_RD = dequantize_1x128(Quantized(normal.codes[chunk], normal.scales[chunk]), torch.float32)
        # grad * result, R D: its sum over rows gives the weight's gradient, its mean over columns enters dx.
        product_RD = grad_RD * normal_RD
        grad_weight_D += product_RD.sum(0)
        hat_RD = normal_RD.div_(divisor_D).mul_(product_RD.mean(1, keepdim=True))
        grad_x_AD[chunk] = torch.mul(grad_RD, weight_D, out=product_RD).sub_(hat_RD).mul_(inverse_A1[chunk])
    return grad_x_AD, grad_weight_D.div_(divisor_D)
