"""The sizes and strides that SwiGLU's tensors may have."""

from torch import Tensor


def width_of(subject: str, num_columns: int, width: int | None = None) -> int:
    """The intermediate size of hidden values whose gate and up lie side by side.

    Args:
        subject: place and name of the hidden values, for the message.
        num_columns: of the hidden values.
        width: what it must be, where that is known.

    Raises:
        ValueError: the columns are not twice the width.
    """
    expected = num_columns // 2 if width is None else width
    if num_columns != 2 * expected:
        rule = "an even number of columns" if width is None else f"twice the gradient's {width} columns"
        raise ValueError(f"{subject} must have {rule}, got {num_columns}; nearest: {2 * expected}")
    return expected


def check_columns(subject: str, matrix: Tensor) -> None:
    """Refuses a matrix whose columns lie apart in memory.

    Raises:
        ValueError: they do.
    """
    if matrix.shape[1] > 1 and matrix.stride(1) != 1:
        raise ValueError(f"{subject} must be contiguous along its columns, got strides {matrix.stride()}")
