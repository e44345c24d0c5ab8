"""Which matrices can be described to Hopper's engine for copying tiles (TMA), and the memory for descriptions."""

from functools import partial

import torch
import triton
from torch import Tensor

ALIGNMENT_BYTES = 16
LARGEST_DESCRIBED_BYTES = 4  # of a number


def is_describable(matrix: Tensor) -> bool:
    """Whether tiles of a matrix can be moved by descriptor: it begins, and its rows follow, at multiples of 16 bytes.

    And they lie in order: a row is contiguous, and no longer than the way to the next.
    """
    row_stride, column_stride = matrix.stride()
    in_order = column_stride == 1 and row_stride >= max(1, matrix.shape[1])
    row_bytes = row_stride * matrix.element_size()
    return in_order and row_bytes % ALIGNMENT_BYTES == 0 and matrix.data_ptr() % ALIGNMENT_BYTES == 0


def make_describable(matrix: Tensor) -> Tensor:
    """The matrix where it is `is_describable`, else a copy that is, its rows apart by whole multiples of 16 bytes."""
    if is_describable(matrix):
        return matrix
    num_rows, num_columns = matrix.shape
    granularity = ALIGNMENT_BYTES // matrix.element_size()
    copied = matrix.new_empty(num_rows, granularity * max(1, -(-num_columns // granularity)))[:, :num_columns]
    return copied.copy_(matrix)


def allow_descriptors(device: torch.device) -> None:
    """Lets the kernels launched next, by this thread, make descriptors; to be called before each such launch.

    The allocator belongs to Triton and to a thread, and autograd runs a backward pass in a thread of its own.
    """
    triton.set_allocator(partial(_workspace, device))


def _workspace(device: torch.device, size: int, alignment: int, stream: int | None) -> Tensor:
    # Torch's allocator aligns to 512 bytes, and gives memory back for use on the same stream only.
    return torch.empty(size, dtype=torch.int8, device=device)
