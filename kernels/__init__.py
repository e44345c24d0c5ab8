"""Operations, each with a reference in plain PyTorch and Triton kernels.

A function raises ValueError if its operands have an unsupported type or shape, or do not match. The shape legend of a
folder is in its `reference.py`, which Triton's files implement. Kernels use int64 offsets, and masks exclude what is
beyond the last row or column. Their tensors must be on the current device.
"""

from base import share_comm

share_comm()
