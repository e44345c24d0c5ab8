"""Causal attention by fused kernels, and what they allocate. Imports torch late."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from kernels.attention import ATTENTION, SIZED, SIZED_CPU, SIZED_CUDA, SIZED_CUDA_PADDED, AttentionKernel

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.attention.documents import Documents

_16_BITS = ("bfloat16", "float16")


def scaled_dot_product(
    query_BHTQ: Tensor, key_BHTQ: Tensor, value_BHTV: Tensor, scale: float, documents: Documents | None
) -> Tensor:
    """Calls torch's `scaled_dot_product_attention`; on a CPU, each document is a separate sequence."""
    from torch.nn import functional

    if documents is not None and query_BHTQ.device.type == "cpu":
        from kernels.attention.documents import attend_by_document

        return attend_by_document(query_BHTQ, key_BHTQ, value_BHTV, scale, documents)
    mask = None if documents is None else documents.bias_B1TT(query_BHTQ.dtype)
    return functional.scaled_dot_product_attention(
        query_BHTQ, key_BHTQ, value_BHTV, attn_mask=mask, is_causal=mask is None, scale=scale
    )


def flex(query_BHTQ: Tensor, key_BHTQ: Tensor, value_BHTV: Tensor, scale: float, documents: Documents | None) -> Tensor:
    """Calls torch's FlexAttention, compiled on CUDA, which skips fully masked blocks."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def is_causal(b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    if documents is None:
        size = query_BHTQ.shape[2]
        block_mask = create_block_mask(is_causal, None, None, size, size, device=query_BHTQ.device)
    else:
        block_mask = documents.block_mask
    call = _compiled_flex() if query_BHTQ.device.type == "cuda" else flex_attention
    mixed: Tensor = call(query_BHTQ, key_BHTQ, value_BHTV, block_mask=block_mask, scale=scale)
    return mixed


@cache
def _compiled_flex() -> Any:
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def flash_attention(
    query_BHTQ: Tensor, key_BHTQ: Tensor, value_BHTV: Tensor, scale: float, documents: Documents | None
) -> Tensor:
    """Calls the package `flash_attn`, which takes documents as sequences of variable length."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func  # type: ignore[import-not-found, unused-ignore]

    rows_BTH = [tensor.transpose(1, 2) for tensor in (query_BHTQ, key_BHTQ, value_BHTV)]
    if documents is None:
        mixed: Tensor = flash_attn_func(*rows_BTH, softmax_scale=scale, causal=True)
        return mixed.transpose(1, 2)
    # All documents of the batch in one sequence, with the start of each.
    starts = documents.starts
    longest = documents.longest
    packed: Tensor = flash_attn_varlen_func(
        *(tensor.flatten(0, 1) for tensor in rows_BTH),
        cu_seqlens_q=starts,
        cu_seqlens_k=starts,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        softmax_scale=scale,
        causal=True,
    )
    return packed.view(*rows_BTH[0].shape[:3], packed.shape[-1]).transpose(1, 2)


ATTENTION.register(
    "sdpa",
    AttentionKernel(
        summary="torch's scaled_dot_product_attention",
        attend=scaled_dot_product,
        has_blocks=True,
        pads_values=lambda device: device == "cpu",
        makes_dense_masks=lambda device: device != "cpu",
        suits=lambda device, dtype, is_packed: True,
    ),
)
ATTENTION.register(
    "flex",
    AttentionKernel(
        summary="torch's FlexAttention, compiled",
        attend=flex,
        devices=("cuda",),
        suits=lambda device, dtype, is_packed: device == "cuda" and is_packed,
    ),
)
ATTENTION.register(
    "flash_attention",
    AttentionKernel(
        summary="the package flash_attn",
        attend=flash_attention,
        devices=("cuda",),
        package="flash_attn",
        dtypes=_16_BITS,
        pads_values=lambda device: True,
        suits=lambda device, dtype, is_packed: device == "cuda" and dtype in _16_BITS,
    ),
)


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
