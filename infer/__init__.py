"""Generation with trained weights."""

from kernels import share_comm

share_comm()
