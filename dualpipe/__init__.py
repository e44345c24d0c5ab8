"""Generates, validates, simulates, draws and executes pipeline schedules."""

from kernels.checkout import share_comm

share_comm()
