"""What the tensors of a format must be, whoever computes with them.

Shape legend: as in kernels/quantize/layout.py.
"""

import torch
from torch import Tensor

from kernels.quantize import num_tiles

CODES = torch.float8_e4m3fn


def check_numbers(subject: str, values: Tensor, num_dims: int | None = None) -> None:
    """Refuses what is no matrix of floating-point numbers.

    Args:
        subject: place and name of the numbers, for the message.
        values: that are to be quantised.
        num_dims: that they must have; None: 2 or more.

    Raises:
        ValueError: another type, or another number of dimensions.
    """
    if not values.is_floating_point():
        raise ValueError(f"{subject} must be floating point, got {values.dtype}; nearest: torch.float32")
    if values.dim() < 2 or num_dims not in (None, values.dim()):
        rule = "at least 2 dimensions" if num_dims is None else f"{num_dims} dimensions"
        raise ValueError(f"{subject} must have {rule}, got {values.dim()}")


def check_codes(subject: str, codes: Tensor, dtype: torch.dtype = CODES) -> None:
    """Refuses codes of another type, which would be read as what they are not.

    Raises:
        ValueError: they are of another type.
    """
    if codes.dtype != dtype:
        raise ValueError(f"{subject} must be {dtype}, got {codes.dtype}")


def check_scales(subject: str, scales: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Refuses scales that are not those of some codes.

    Args:
        subject: place and name of the scales, for the message.
        scales: that were given.
        shape: that the codes demand.
        device: where the codes are.

    Raises:
        ValueError: another type, shape or device.
    """
    if scales.dtype != torch.float32:
        raise ValueError(f"{subject} must be torch.float32, got {scales.dtype}")
    if tuple(scales.shape) != shape:
        raise ValueError(f"{subject} must be {list(shape)}, got {list(scales.shape)}")
    if scales.device != device:
        raise ValueError(f"{subject} must be on {device}, where the codes are, got {scales.device}")


def check_quantized(subject: str, codes: Tensor, scales: Tensor) -> None:
    """Refuses codes and scales that are not of rows by 128 columns.

    Raises:
        ValueError: codes of another type or number of dimensions, or scales that do not fit them.
    """
    check_codes(f"{subject}: codes", codes)
    check_numbers(f"{subject}: codes", codes, 2)
    shape = (codes.shape[0], num_tiles(codes.shape[1]))
    check_scales(f"{subject}: scales", scales, shape, codes.device)


def check_quantized_blocks(subject: str, codes: Tensor, scales: Tensor) -> None:
    """Refuses codes and scales that are not of matrices by blocks of 128 x 128.

    Raises:
        ValueError: codes of another type or number of dimensions, or scales that do not fit them.
    """
    check_codes(f"{subject}: codes", codes)
    check_numbers(f"{subject}: codes", codes)
    *leading, num_rows, num_columns = codes.shape
    shape = (*leading, num_tiles(num_rows), num_tiles(num_columns))
    check_scales(f"{subject}: scales", scales, shape, codes.device)
