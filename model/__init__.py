"""Defines the network as phases."""

from kernels import share_comm

share_comm()
