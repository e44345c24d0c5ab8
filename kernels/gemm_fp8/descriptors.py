"""Conditions and memory for descriptors of Hopper's tensor memory accelerator (TMA)."""

from functools import partial

import torch
import triton
from torch import Tensor

ALIGNMENT_BYTES = 16
LARGEST_DESCRIBED_BYTES = 4  # of a number


def is_describable(matrix: Tensor) -> bool:
    """Whether tiles can be moved by descriptor: the matrix and its rows are 16-byte aligned.

    In addition a row must be contiguous and no longer than the row stride.
    """
    row_stride, column_stride = matrix.stride()
    in_order = column_stride == 1 and row_stride >= max(1, matrix.shape[1])
    row_bytes = row_stride * matrix.element_size()
    return in_order and row_bytes % ALIGNMENT_BYTES == 0 and matrix.data_ptr() % ALIGNMENT_BYTES == 0


def make_describable(matrix: Tensor) -> Tensor:
    """Returns the matrix if it `is_describable`, else a copy whose rows begin at multiples of 16 bytes."""
    if is_describable(matrix):
        return matrix
    num_rows, num_columns = matrix.shape
    granularity = ALIGNMENT_BYTES // matrix.element_size()
    copied = matrix.new_empty(num_rows, granularity * max(1, -(-num_columns // granularity)))[:, :num_columns]
    return copied.copy_(matrix)


def allow_descriptors(device: torch.device) -> None:
    """Lets this thread's next kernel launches create descriptors; must be called before each such launch.

    Triton's allocator is set per thread, and autograd runs a backward pass in its own thread.
    """
    triton.set_allocator(partial(_workspace, device))


def _workspace(device: torch.device, size: int, alignment: int, stream: int | None) -> Tensor:
    # Torch's allocator aligns to 512 bytes and reuses memory only on the same stream.
    return torch.empty(size, dtype=torch.int8, device=device)
