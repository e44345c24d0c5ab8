"""Pipeline schedules and their interpreter."""

from kernels.checkout import share_comm

share_comm()
