"""Turns text into batches of token sequences."""

from kernels.checkout import share_comm

share_comm()
