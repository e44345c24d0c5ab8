"""Turns text into batches of token sequences."""

from kernels import share_comm

share_comm()
