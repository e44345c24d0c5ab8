"""Converts rows of several types to one message and back."""

from itertools import accumulate

import torch
from torch import Tensor

from comm.context.protocol import Rows

_ALIGNMENT_BYTES = 16


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def to_bytes(rows: Rows) -> Tensor:
    """Returns the bytes of all tensors one after the other, each from a multiple of 16 bytes on, uint8."""
    flat = [each.contiguous().flatten().view(torch.uint8) for each in rows]
    if len(flat) == 1:
        return flat[0]
    message = flat[0].new_zeros(sum(_aligned(each.numel()) for each in flat))
    for start, each in zip(_starts(rows), flat, strict=True):
        message[start : start + each.numel()] = each
    return message


def from_bytes(message: Tensor, like: Rows) -> Rows:
    """Reverses `to_bytes`: returns views of the message, with the shapes and types of `like`."""
    starts = _starts(like)
    return tuple(
        message[start : start + each.nbytes].view(each.dtype).view(each.shape)
        for start, each in zip(starts, like, strict=True)
    )


def _starts(rows: Rows) -> list[int]:
    return [0, *accumulate(_aligned(each.nbytes) for each in rows[:-1])]
