"""Defines the network as phases."""

from kernels.checkout import share_comm

share_comm()
