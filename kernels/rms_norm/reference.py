"""Root-mean-square normalisation and its backward, in plain PyTorch.

Shape legend: ... leading dims, D normalised size.
"""

import torch
from torch import Tensor

from kernels.operands import check_operand
from kernels.quantize.layout import Quantized, check_quantized


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last dim, [..., 1], in float32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    length: Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def normalize(x: Tensor, scale: Tensor, weight_D: Tensor) -> Tensor:
    """x * scale, cast to x's type, then times the weight: the released code's order. Same shape and type as x.

    Args:
        x: [..., D].
        scale: `inverse_rms` of x.
        weight_D: in x's type.
    """
    return (x * scale).to(x.dtype).mul_(weight_D)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`normalize` of x, and the `inverse_rms` that it took.

    Raises:
        ValueError: there is not a weight for each column.
    """
    check_weight("rms_norm", weight_D, x)
    scale = inverse_rms(x, eps)
    return normalize(x, scale, weight_D), scale


def normalize_backward(grad: Tensor, x: Tensor, scale: Tensor, weight_D: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `normalize` in x, [..., D], and in the weight, [D]; computed in `scale`'s type.

    Args:
        grad: of the output, [..., D].
        x: as in the forward.
        scale: `inverse_rms` of x.
        weight_D: as in the forward.

    Raises:
        ValueError: operands that do not fit each other.
    """
    check_backward("normalize_backward", grad, x, scale, weight_D)
    wide, wide_grad, weight = x.to(scale.dtype), grad.to(scale.dtype), weight_D.to(scale.dtype)
    # torch's fused backward of layer norm, told that the mean is 0; what it takes off for the mean is added again.
    grad_x, grad_weight_D, _ = torch.ops.aten.native_layer_norm_backward(
        wide_grad, wide, [x.shape[-1]], torch.zeros_like(scale), scale, weight, None, [True, True, False]
    )
    grad_x.addcmul_(scale, (wide_grad @ weight).unsqueeze_(-1), value=1 / x.shape[-1])
    return grad_x.to(x.dtype), grad_weight_D.to(weight_D.dtype)


def check_weight(subject: str, weight_D: Tensor, x: Tensor) -> None:
    """Refuses a weight that is not one number for each column.

    Raises:
        ValueError: another shape or device.
    """
    check_operand(f"{subject}: weight_D", weight_D, (x.shape[-1],), x.device)


def check_backward(subject: str, grad: Tensor, x: Tensor, scale: Tensor, weight_D: Tensor) -> None:
    """Refuses operands of a backward that are not those of one forward.

    Raises:
        ValueError: another shape or device.
    """
    check_operand(f"{subject}: grad", grad, tuple(x.shape), x.device)
    check_operand(f"{subject}: scale", scale, (*x.shape[:-1], 1), x.device)
    check_weight(subject, weight_D, x)


def check_backward_from_codes(
    subject: str, grad_AD: Tensor, normal: Quantized, inverse_A1: Tensor, weight_D: Tensor
) -> None:
    """Refuses operands of a backward from codes that are not those of one forward.

    Raises:
        ValueError: another shape, type or device.
    """
    size, num_columns = grad_AD.shape
    check_operand(f"{subject}: codes", normal.codes, (size, num_columns), grad_AD.device)
    check_quantized(subject, *normal)
    check_operand(f"{subject}: inverse_A1", inverse_A1, (size, 1), grad_AD.device)
    check_weight(subject, weight_D, grad_AD)
