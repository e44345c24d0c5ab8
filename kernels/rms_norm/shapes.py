"""What the operands of a normalisation must agree on, whoever computes it.

Shape legend: ... leading dims, A rows, D normalised size.
"""

from torch import Tensor

from kernels.operands import check_operand
from kernels.quantize.checks import check_quantized
from kernels.quantize.layout import Quantized


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
