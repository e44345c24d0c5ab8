"""Attention of some queries over some keys, merged over blocks of keys. Imports no torch.

Each block returns the logarithm of its queries' sums of exponentials, by which blocks are merged (as in FlashAttention,
arXiv:2205.14135). The backward of a block needs the merged result and logarithm only.
"""

# Shape legend: B sequences, T tokens, H heads, Q size of a query or key, V size of a value, S sequences of one call, L
# queries and K keys of each.

from __future__ import annotations

from typing import TYPE_CHECKING

from kernels.attention import ATTENTION, AUTO, SIZED_CPU

if TYPE_CHECKING:
    import torch

    from kernels.attention.block_kernels import BlockKernel


class BlockKernelError(ValueError):
    """Raised if an attention kernel does not return the logarithms that blocks need."""


def choose_block_kernel(name: str, device: torch.device, dtype: torch.dtype) -> BlockKernel:
    """Returns the block kernel of an attention kernel or `auto`; raises BlockKernelError if it has none.

    On a CPU it is torch's flash kernel. On CUDA it is torch's flash kernel for types of 16 bits, its memory-efficient
    kernel for float32, and the reference for float64, which fused kernels do not support.
    """
    if device.type != "meta" and not has_blocks(name):
        nearest = ", ".join(each for each in (AUTO, *ATTENTION.names()) if has_blocks(each))
        raise BlockKernelError(
            f"attention: must return sums of exponentials if ranks share sequences, is {name}; nearest valid: {nearest}"
        )
    from kernels.attention import block_kernels

    if device.type == "cpu" or name == SIZED_CPU:
        return block_kernels.CPU_FLASH
    return {2: block_kernels.CUDA_FLASH, 4: block_kernels.CUDA_EFFICIENT}.get(dtype.itemsize, block_kernels.REFERENCE)


def has_blocks(name: str) -> bool:
    """Whether an attention kernel, or `auto`, can compute attention by blocks."""
    return name == AUTO or ATTENTION.get(name).has_blocks
