"""Checks of a kernel's operands; without them a kernel would silently access memory out of bounds."""

import torch
from torch import Tensor


def check_operand(
    subject: str, operand: Tensor, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype | None = None
) -> None:
    """Raises ValueError unless an operand has this shape, device and, if given, type; `subject` names it."""
    if tuple(operand.shape) != shape:
        raise ValueError(f"{subject} must be {list(shape)}, got {list(operand.shape)}")
    if operand.device != device:
        raise ValueError(f"{subject} must be on {device}, where the other operands are, got {operand.device}")
    if dtype is not None and operand.dtype != dtype:
        raise ValueError(f"{subject} must be {dtype}, as the other operands are, got {operand.dtype}")


def check_columns(subject: str, matrix: Tensor) -> None:
    """Raises ValueError unless the last dimension is contiguous, along which kernels read."""
    if matrix.shape[-1] > 1 and matrix.stride(-1) != 1:
        raise ValueError(f"{subject} must be contiguous along its columns, got strides {matrix.stride()}")
