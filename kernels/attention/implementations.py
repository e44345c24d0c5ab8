"""Causal attention over whole sequences through torch's and others' fused kernels.

Each implementation is a differentiable function (query_BHTQ, key_BHTQ, value_BHTV, scale, documents) -> mixed_BHTV.
Shape legend: B sequences, H heads, T tokens, Q size of a query or key, V size of a value (which an implementation may
want to equal Q: see `values_as_wide_as_keys`).
"""

from functools import cache
from importlib.util import find_spec
from typing import Any, Protocol, assert_never

import torch
from torch import Tensor
from torch.nn import functional

from kernels.attention.documents import Documents
from kernels.attention.kinds import AttentionKind, FusedKind


class Attention(Protocol):
    """One implementation."""

    def __call__(
        self, query_BHTQ: Tensor, key_BHTQ: Tensor, value_BHTV: Tensor, scale: float, documents: Documents | None
    ) -> Tensor:
        """mixed_BHTV: each query's mean of the values that it may see, by softmax of scaled scores.

        documents: None: every token sees all tokens of its sequence up to itself.
        """


def scaled_dot_product(
    query_BHTQ: Tensor, key_BHTQ: Tensor, value_BHTV: Tensor, scale: float, documents: Documents | None
) -> Tensor:
    """torch's `scaled_dot_product_attention`."""
    mask = None if documents is None else documents.bias_B1TT(query_BHTQ.dtype)
    return functional.scaled_dot_product_attention(
        query_BHTQ, key_BHTQ, value_BHTV, attn_mask=mask, is_causal=mask is None, scale=scale
    )


def flash_attention(
    query_BHTQ: Tensor, key_BHTQ: Tensor, value_BHTV: Tensor, scale: float, documents: Documents | None
) -> Tensor:
    """The package `flash_attn` on CUDA, bf16 or fp16; documents as sequences of their own lengths."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func  # type: ignore[import-not-found, unused-ignore]

    rows_BTH = [tensor.transpose(1, 2) for tensor in (query_BHTQ, key_BHTQ, value_BHTV)]
    if documents is None:
        mixed: Tensor = flash_attn_func(*rows_BTH, softmax_scale=scale, causal=True)
        return mixed.transpose(1, 2)
    starts, longest = documents.starts, documents.longest
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


def flex(query_BHTQ: Tensor, key_BHTQ: Tensor, value_BHTV: Tensor, scale: float, documents: Documents | None) -> Tensor:
    """torch's FlexAttention, compiled on CUDA: blocks that nothing sees are skipped."""
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
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def attention_for(kind: AttentionKind, device: torch.device, dtype: torch.dtype, is_packed: bool) -> FusedKind:
    """The implementation that `auto` stands for; any other kind stands for itself.

    Args:
        kind: asked for.
        device: of the tensors.
        dtype: of the tensors.
        is_packed: whether sequences hold several documents that must not see each other.
    """
    if kind != "auto":
        return kind
    if device.type != "cuda":
        return "sdpa"
    if find_spec("flash_attn") is not None and dtype in (torch.bfloat16, torch.float16):
        return "flash_attention"
    return "flex" if is_packed else "sdpa"


def attention(kind: FusedKind) -> Attention:
    """The function of one kind; imports a package only when it is called."""
    match kind:
        case "sdpa":
            return scaled_dot_product
        case "flash_attention":
            return flash_attention
        case "flex":
            return flex
        case _ as other:
            assert_never(other)


def values_as_wide_as_keys(kind: FusedKind, device: torch.device) -> bool:
    """Whether values must be padded to the keys' size: so for torch's fused kernel on CPU, and for `flash_attn`."""
    return (kind == "sdpa" and device.type == "cpu") or kind == "flash_attention"
