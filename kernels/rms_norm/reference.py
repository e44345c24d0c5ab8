"""Root-mean-square normalisation and its backward, in plain PyTorch.

Shape legend: ... leading dims, D normalised size.
"""

import torch
from torch import Tensor

from kernels.rms_norm.shapes import check_backward, check_weight


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last dim, [..., 1], in float32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    length: Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def normalise(x: Tensor, scale: Tensor, weight_D: Tensor) -> Tensor:
    """x * scale, cast to x's type, then times the weight: the released code's order. Same shape and type as x.

    Args:
        x: [..., D].
        scale: `inverse_rms` of x.
        weight_D: in x's type.
    """
    return (x * scale).to(x.dtype).mul_(weight_D)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`normalise` of x, and the `inverse_rms` that it took.

    Raises:
        ValueError: there is not a weight for each column.
    """
    check_weight("rms_norm", weight_D, x)
    scale = inverse_rms(x, eps)
    return normalise(x, scale, weight_D), scale


def normalise_backward(grad: Tensor, x: Tensor, scale: Tensor, weight_D: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `normalise` in x, [..., D], and in the weight, [D]; computed in `scale`'s type.

    Args:
        grad: of the output, [..., D].
        x: as in the forward.
        scale: `inverse_rms` of x.
        weight_D: as in the forward.

    Raises:
        ValueError: operands that do not fit each other.
    """
    check_backward("normalise_backward", grad, x, scale, weight_D)
    wide, wide_grad, weight = x.to(scale.dtype), grad.to(scale.dtype), weight_D.to(scale.dtype)
    # torch's fused backward of layer norm, told that the mean is 0; what it takes off for the mean is added again.
    grad_x, grad_weight_D, _ = torch.ops.aten.native_layer_norm_backward(
        wide_grad, wide, [x.shape[-1]], torch.zeros_like(scale), scale, weight, None, [True, True, False]
    )
    grad_x.addcmul_(scale, (wide_grad @ weight).unsqueeze_(-1), value=1 / x.shape[-1])
    return grad_x.to(x.dtype), grad_weight_D.to(weight_D.dtype)
