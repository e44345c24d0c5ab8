"""Attention on tensors without memory: allocates what fused kernels allocate."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernels.attention import SIZED, SIZED_CPU, SIZED_CUDA, SIZED_CUDA_PADDED, AttentionKernel

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.attention.documents import Documents


def _on_cpu(
    query_BHTQ: Tensor, key_BHTQ: Tensor, value_BHTV: Tensor, scale: float, documents: Documents | None
) -> Tensor:
    import torch

    results = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query_BHTQ, key_BHTQ, value_BHTV, 0.0, True, scale=scale
    )
    mixed_BHTV: Tensor = results[0]
    return mixed_BHTV


def _on_cuda(
    query_BHTQ: Tensor, key_BHTQ: Tensor, value_BHTV: Tensor, scale: float, documents: Documents | None
) -> Tensor:
    import torch

    # Keeps as much as the other kernels, and takes values that are not as wide as keys.
    results = torch.ops.aten._scaled_dot_product_efficient_attention(
        query_BHTQ, key_BHTQ, value_BHTV, None, True, 0.0, True, scale=scale
    )
    mixed_BHTV: Tensor = results[0]
    return mixed_BHTV


SIZED.register(SIZED_CPU, AttentionKernel(summary="sizes on a CPU", attend=_on_cpu, pads_values=lambda device: True))
SIZED.register(SIZED_CUDA, AttentionKernel(summary="sizes on CUDA", attend=_on_cuda))
SIZED.register(
    SIZED_CUDA_PADDED, AttentionKernel(summary="sizes on CUDA", attend=_on_cuda, pads_values=lambda device: True)
)
