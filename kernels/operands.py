"""What an operand of a kernel must agree on with another one; a kernel would read or write beyond it without a word."""

import torch
from torch import Tensor


def check_operand(
    subject: str, operand: Tensor, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype | None = None
) -> None:
    """Refuses an operand that does not fit the others.

    Args:
        subject: place and name of the operand, for the message.
        operand: that was given.
        shape: that it must have.
        device: where the others are.
        dtype: that it must have; None: any.

    Raises:
        ValueError: another shape, device or type.
    """
    if tuple(operand.shape) != shape:
        raise ValueError(f"{subject} must be {list(shape)}, got {list(operand.shape)}")
    if operand.device != device:
        raise ValueError(f"{subject} must be on {device}, where the other operands are, got {operand.device}")
    if dtype is not None and operand.dtype != dtype:
        raise ValueError(f"{subject} must be {dtype}, as the other operands are, got {operand.dtype}")
