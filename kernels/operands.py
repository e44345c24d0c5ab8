"""Checks of a kernel's operands; without them a kernel would silently access memory out of bounds."""

import torch
from torch import Tensor


def check_operand(
    subject: str, operand: Tensor, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype | None = None
) -> None:
    """Checks that an operand matches the others.

    Args:
        subject: operation and name of the operand, for the message.
        device: device of the other operands.
        dtype: required type; None for any.

    Raises:
        ValueError: the shape, device or type differs.
    """
    if tuple(operand.shape) != shape:
        raise ValueError(f"{subject} must be {list(shape)}, got {list(operand.shape)}")
    if operand.device != device:
        raise ValueError(f"{subject} must be on {device}, where the other operands are, got {operand.device}")
    if dtype is not None and operand.dtype != dtype:
        raise ValueError(f"{subject} must be {dtype}, as the other operands are, got {operand.dtype}")
