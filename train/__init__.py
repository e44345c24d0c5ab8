"""Assembles a training run and runs it."""

from kernels.checkout import share_comm

share_comm()
