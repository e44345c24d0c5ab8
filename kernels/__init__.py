"""Operations, each with a reference in plain PyTorch and Triton kernels."""

from kernels.checkout import share_comm

share_comm()
