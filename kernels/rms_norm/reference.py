"""Root-mean-square normalization and its backward, in plain PyTorch."""

# Shape legend: ... leading dims, D normalized size.

import torch
from torch import Tensor

from kernels.operands import check_operand
from kernels.quantize.layout import Quantized, check_quantized

LARGEST_COLUMNS = 2**13  # above this, the sums for the weight do not fit a program's registers


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """Computes 1 / sqrt(mean(x^2) + eps) over the last dim, [..., 1], in float32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
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
    wide, wide_grad, weight = x.to(scale.dtype), grad.to(scale.dtype), weight_D.to(scale.dtype)
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
