"""Assembles a training run and runs it."""

from kernels import share_comm

share_comm()
