"""Normalizes rows by their root mean square, in the rows' type or to FP8, and computes gradients.

Triton's kernels hold whole rows: plain PyTorch runs instead if a row does not fit a program or is not contiguous.
"""

from collections.abc import Callable

from torch import Tensor

from kernels.operation import operation, runs_as_on_cuda
from kernels.rms_norm import reference


def _fit_program(*matrices: Tensor) -> bool:
    return all(
        rows.shape[-1] <= reference.LARGEST_COLUMNS and (rows.stride(-1) == 1 or rows.shape[-1] == 1)
        for rows in matrices
    )


rms_norm = operation(reference.rms_norm, cuda="triton", fits=lambda x, *rest: _fit_program(x))
normalize_backward = operation(
    reference.normalize_backward, cuda="triton", fits=lambda grad, x, *rest: _fit_program(grad, x)
)
rms_norm_quantize = operation(reference.rms_norm_quantize, cuda="triton", fits=lambda x_AD, *rest: _fit_program(x_AD))
rms_norm_backward_from_codes = operation(
    reference.rms_norm_backward_from_codes, cuda="triton", fits=lambda grad_AD, *rest: _fit_program(grad_AD)
)


def inverse_rms(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Computes the second result of `rms_norm` alone, in one kernel where that computes both."""
    return rms_norm(x, weight_D, eps)[1] if runs_as_on_cuda(x.device) else reference.inverse_rms(x, eps)


def normalize(x: Tensor, weight_D: Tensor, eps: float, scale: Callable[[], Tensor]) -> Tensor:
    """Computes the first result of `rms_norm` again, from the second if that takes less time."""
    return rms_norm(x, weight_D, eps)[0] if runs_as_on_cuda(x.device) else reference.normalize(x, scale(), weight_D)
