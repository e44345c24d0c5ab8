"""Generation with trained weights."""

from kernels.checkout import share_comm

share_comm()
