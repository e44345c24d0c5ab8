"""Reorders rows by index, and reverses this with a sum per token."""

from kernels.operation import operation
from kernels.permute import reference

permute = operation(reference.permute, cuda="triton")
unpermute = operation(reference.unpermute, cuda="triton")
