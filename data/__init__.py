"""Text to batches."""

from kernels.checkout import share_comm

share_comm()
